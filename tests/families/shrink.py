"""Makes the default config of a family small, by what the names of its settings say."""

import copy
import re
from collections.abc import Callable
from typing import Any

HIDDEN, HEADS, HEAD_SIZE, FEED_FORWARD, VOCABULARY, LAYERS = 32, 4, 8, 48, 99, 2


def at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def always(number: int) -> Callable[[int], int]:
    return lambda value: number


def unchanged(value: int) -> int:
    return value


NUMBERS: list[tuple[str, Callable[[int], int]]] = [
    (r"vocab_size|^n_vocab$|^vocabulary_size$", at_most(VOCABULARY)),
    (r"max_position|max_seq|^n_positions|^n_ctx|max_source|max_target|max_length|seq_length|max_2d", at_most(128)),
    (r"^mamba_(n_heads|num_heads)$|^(n|num)_mamba_heads$", always(8)),
    (r"^mamba_(d_head|headdim|head_dim)$", always(8)),
    (r"^mamba_d_ssm$", always(2 * HIDDEN)),
    (r"^(mamba_)?n_?groups$", at_most(1)),
    (r"(attention_heads|num_heads|n_heads?|_heads)$", at_most(HEADS)),
    (r"(head_dim|d_kv|kv_channels|qk_rope_head_dim|rotary_dim|head_size|^d_head)$", at_most(HEAD_SIZE)),
    (r"_rank$", at_most(8)),
    (r"(moe_k|top_k|_topk|_per_tok|_per_token|num_selected_experts|top_k_experts|n_activated_experts)$", at_most(2)),
    (r"topk_groups?$|^n_group$|^num_expert_group", always(1)),
    (r"size_per_layer_input", at_most(8)),
    (r"(num_experts|num_local_experts|n_routed_experts|num_routed_experts)$", at_most(4)),
    (r"(n|num)_shared_experts$", at_most(1)),
    (r"^(num_feat_extract_layers|num_conv_layers|adapter_layers)$", unchanged),
    (r"^(first_k_dense_replace|num_dense_layers)$", at_most(1)),
    (r"(n_layers?|layers|depth|num_blocks|layers_num)$", at_most(LAYERS)),
    (r"^window_size$", at_most(2)),
    (r"moe_intermediate_size|expert_intermediate|expert_dim", at_most(24)),
    (r"intermediate|ffn|d_ff|n_inner|feed_forward|mlp_dim|ff_dim|dim_ff", at_most(FEED_FORWARD)),
    (r"(image_size|input_size|img_size|crop_size)$", at_most(32)),
    (r"patch_size$", at_most(8)),
    (r"^(num_channels|in_channels|audio_channels|in_chans|kernel_dim)$", unchanged),
    (r"(hidden_size|d_model|n_embd|embedding_size|dim|width|_channels|decoder_hidden)$", at_most(HIDDEN)),
    (r"(projection_size|bottleneck_size)$", at_most(HIDDEN)),
    (r"d_state|state_size|ssm_state", at_most(8)),
    (r"num_mel_bins|num_mel|feature_size|n_mels", at_most(16)),
    (r"chunk_size$", at_most(8)),
    (r"(num_queries|query_length|num_query_tokens|num_latents)$", at_most(6)),
    (r"num_frames|tubelet", at_most(4)),
]
"""The first pattern that is found in a lower-case name gives the small value."""

KEY_HEADS = r"(num_key_value_heads|kv_heads|multi_query_group_num|n_head_kv)$"
QUERY_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "attention_heads", "encoder_attention_heads")
TOKEN = r"(token_id|token_index|_token)$"
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
LAYER_KINDS = r"(layer_types|layers_block_type|block_types|attention_types|layers_types)$"
DROPPED = {
    *("per_layer_config", "out_features", "out_indices", "_out_features", "_out_indices", "stage_names"),
    *("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "name_or_path"),
    *("return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder", "id2label", "label2id"),
    *("problem_type", "chunk_size_feed_forward", "attribute_map", "keys_to_ignore_at_inference"),
}
"""What a config computes from the rest, or what says nothing about the size."""


def shrink(config: dict[str, Any], own: dict[str, Any], mrope: bool = False) -> dict[str, Any]:
    """A small copy of a config as a dict.

    Args:
        config: what `to_dict` of a default config returns.
        own: settings that replace those found by rule; a dict for a sub-config.
        mrope: whether rotary embeddings need the sections of images.
    """
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in DROPPED:
            continue
        if name in own and not isinstance(own[name], dict):
            small[name] = own[name]
        elif name in ("rope_parameters", "rope_scaling"):
            small[name] = _small_rope(copy.deepcopy(value), mrope)
        elif isinstance(value, dict) and ("model_type" in value or name.endswith("_config")):
            small[name] = shrink(value, own.get(name, {}), mrope)
        else:
            small[name] = _small_value(name.lower(), value, config)
    _shorten_layer_lists(small, config, own)
    return small | {name: value for name, value in own.items() if name not in small}


def _small_value(name: str, value: Any, config: dict[str, Any]) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        if re.search(TOKEN, name):
            return value if value < 60 else 60 + sum(map(ord, name)) * 7 % 38
        if re.search(KEY_HEADS, name):
            heads = next((config[n] for n in QUERY_HEADS if isinstance(config.get(n), int)), None)
            return min(value, HEADS if heads == value else 2)
        return next((small(value) for pattern, small in NUMBERS if re.search(pattern, name)), value)
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return type(value)(_small_list(name, list(value)))
    return value


def _small_list(name: str, values: list[int]) -> list[int]:
    if re.search(r"(depths|num_blocks|layers)$", name):
        return [min(value, 1) for value in values]
    if re.search(r"hidden_sizes|embed_dims?|channels|dims|widths|_dim|neck_hidden_sizes|feature_sizes", name):
        # Up to 4 are the channels of an image
        return [v if v <= 4 else max(8, v * HIDDEN // max(values) // 8 * 8) for v in values]
    if re.search(r"image_size|img_size", name):
        return [min(value, 32) for value in values]
    if re.search(r"patch_size", name):
        return [min(value, 8) for value in values]
    if "head" in name:
        return [2 ** min(i + 1, 2) if max(values) > 1 else 1 for i in range(len(values))]
    return values


def _small_rope(rope: Any, mrope: bool) -> Any:
    if not isinstance(rope, dict):
        return rope
    if "mrope_section" in rope or (mrope and rope.get("rope_type", "axial") != "axial"):
        rope["mrope_section"] = [2, 1, 1]
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = 64
    for name in ("short_factor", "long_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = [1.0] * (HEAD_SIZE // 2)
    return {name: _small_rope(value, mrope) for name, value in rope.items()}


def _shorten_layer_lists(small: dict[str, Any], config: dict[str, Any], own: dict[str, Any]) -> None:
    """Lists with an item for each layer get as many items as there are layers, and each kind of layer at least one."""
    count = next((small[name] for name in LAYER_COUNTS if isinstance(small.get(name), int)), None)
    lists = {n: v for n, v in small.items() if isinstance(v, list | tuple) and v and n not in own}
    kinds = {n: list(dict.fromkeys(v)) for n, v in lists.items() if re.search(LAYER_KINDS, n) and type(v[0]) is str}
    if not count:
        return
    count = max([count, *(len(names) for names in kinds.values())])
    for name in LAYER_COUNTS:
        if name in small:
            small[name] = count
    for name, values in lists.items():
        if name in kinds:
            small[name] = [kinds[name][i % len(kinds[name])] for i in range(count)]
        elif len(values) > count and len(values) == config.get("num_hidden_layers"):
            small[name] = list(values)[:count]
