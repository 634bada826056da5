"""What the rules of `shrink` and `tiny_family` do not give: settings and inputs of single families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Override:
    config: dict[str, Any] = field(default_factory=dict)
    """Settings; a dict for those of a sub-config."""
    model_class: str | None = None
    """The class, if the auto classes have none or not the usual one."""
    inputs: Callable[[Any, Inputs], Inputs] | None = None
    """Gets the model and the inputs made by rule, and returns those to use."""


def _with(**more: Any) -> Callable[[Any, Inputs], Inputs]:
    return lambda model, inputs: inputs | more


def _image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def _with_images(model: Any, inputs: Inputs) -> Inputs:
    return inputs | {"pixel_values": _image(2, 3, 32, 32)}


def _idefics(model: Any, inputs: Inputs) -> Inputs:
    return inputs | {
        "pixel_values": _image(2, 1, 3, 32, 32),
        "image_attention_mask": torch.ones(2, inputs["input_ids"].shape[1], 1, dtype=torch.bool),
    }


def _blip(model: Any, inputs: Inputs) -> Inputs:
    """As many placeholders as the Q-Former has queries."""
    tokens = inputs["input_ids"].clamp(max=model.config.image_token_index - 1)
    tokens[:, : model.config.num_query_tokens] = model.config.image_token_index
    more = {"qformer_input_ids": tokens} if "instruct" in model.config.model_type else {}
    return inputs | {"input_ids": tokens, "pixel_values": _image(2, 3, 32, 32)} | more


def _mono(model: Any, inputs: Inputs) -> Inputs:
    return inputs | {"input_values": inputs["input_values"][:, None]}


def _sound_first(model: Any, inputs: Inputs) -> Inputs:
    """(batch, bins, time) instead of (batch, time, bins)."""
    return inputs | {"input_features": inputs["input_features"].transpose(1, 2)}


def _query_embeds(model: Any, inputs: Inputs) -> Inputs:
    hidden, encoder = model.config.hidden_size, model.config.encoder_hidden_size
    return {"query_embeds": _image(2, 5, hidden), "encoder_hidden_states": _image(2, 9, encoder)}


def _series(model: Any, inputs: Inputs) -> Inputs:
    config = model.config
    return {"past_values": _image(2, config.context_length, config.num_input_channels)}


def _lxmert(model: Any, inputs: Inputs) -> Inputs:
    size = model.config.visual_feat_dim
    return inputs | {"visual_feats": _image(2, 5, size), "visual_pos": _image(2, 5, 4).sigmoid()}


_NO_HEAD_SIZE = Override({"head_dim": 8})
_LATENT = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4}
_GROUPS = {"feature_size": 32, "mask_feature_size": 32}

OVERRIDES: dict[str, Override] = {
    "audio-spectrogram-transformer": Override(
        {"max_length": 64}, inputs=lambda m, x: {"input_values": _image(2, 64, 16)}
    ),
    "bamba": Override({"attn_layer_indices": [1]}),
    "bit": Override({"num_groups": 4}),
    "blip-2": Override({"image_token_index": 57, "num_query_tokens": 6}, inputs=_blip),
    "blip_2_qformer": Override(inputs=_query_embeds),
    "dac": Override(inputs=_mono),
    "encodec": Override(inputs=_mono),
    "deepseek_v2": Override({"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "topk_method": "greedy"}),
    "dots1": Override({"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "esm": Override({"vocab_size": 64, "pad_token_id": 1, "mask_token_id": 2}),
    "glm4v_moe": Override({"text_config": {"head_dim": 16}}),
    "glm4v_moe_text": Override({"head_dim": 16}),
    "jamba": Override({"attn_layer_period": 2, "attn_layer_offset": 1}),
    "kimi_linear": Override({"num_experts": 8}),
    # The auto classes find it by the name EvollaModel only
    "evolla": Override(model_class="EvollaForProteinText2Text"),
    "gemma3n_text": Override({"num_kv_shared_layers": 0}),
    "glmasr_encoder": Override(inputs=_sound_first),
    "voxtral_realtime_encoder": Override(inputs=_sound_first),
    "gpt_neo": Override({"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]}),
    "granitemoehybrid": Override({"layer_types": ["mamba", "attention"]}),
    "hunyuan_v1_dense": _NO_HEAD_SIZE,
    "hunyuan_v1_moe": _NO_HEAD_SIZE,
    "idefics": Override(inputs=_idefics),
    "instructblip": Override({"image_token_index": 57, "num_query_tokens": 6}, inputs=_blip),
    "layoutlmv3": Override({"coordinate_size": 5, "shape_size": 6}, inputs=_with_images),
    "lilt": Override({"hidden_size": 48}),
    "lxmert": Override({"visual_feat_dim": 32}, inputs=_lxmert),
    "mamba2": Override({"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "mask2former": Override(_GROUPS),
    "maskformer": Override({"fpn_feature_size": 32, "mask_feature_size": 32}),
    "ministral": _NO_HEAD_SIZE,
    "mistral4": Override(_LATENT),
    "longcat_flash": Override(_LATENT | {"qk_head_dim": 16}),
    "moonshine": Override({"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}),
    "nemotron": Override({"num_key_value_heads": 2, "head_dim": 8}),
    "patchtst": Override(inputs=_series),
    "patchtsmixer": Override(inputs=_series),
    "siglip2_vision_model": Override(
        inputs=lambda m, x: {
            "pixel_values": _image(2, 16, 3 * 8 * 8),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
        }
    ),
    "step3p7": Override({"text_config": {"sliding_window": 8}}),
    "swin": Override({"image_size": 224, "patch_size": 4, "window_size": 7}),
    "donut-swin": Override({"image_size": 224, "patch_size": 4, "window_size": 7}),
    "vilt": Override(inputs=_with_images),
    "speech-encoder-decoder": Override(
        inputs=lambda m, x: {"inputs": _image(2, 4000), "decoder_input_ids": x["decoder_input_ids"]}
    ),
    "wav2vec2-bert": Override({"vocab_size": 64}),
    "wav2vec2-conformer": Override({"vocab_size": 64}),
    "xmod": Override({"languages": ["en_XX"], "default_language": "en_XX"}),
}
