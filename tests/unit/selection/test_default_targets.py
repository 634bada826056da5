"""The default targets: value and output projections, of a composite model those of its language model."""

import re

import pytest
from tiny_family import tiny_family
from torch import nn

from sparse_zero.errors import UserError
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.targets import find_modules_to_save, find_targets

LANGUAGE_MODEL = ["model.language_model.layers.*.self_attn.o_proj", "model.language_model.layers.*.self_attn.v_proj"]
TEXT_MODEL = [name.replace("language_model", "text_model") for name in LANGUAGE_MODEL]
COMPOSITE = {
    "llava": (LANGUAGE_MODEL, "model.language_model; model.vision_tower and model.multi_modal_projector stay"),
    "gemma3": (LANGUAGE_MODEL, "model.language_model; model.vision_tower stays"),
    "paligemma": (LANGUAGE_MODEL, "model.language_model; model.vision_tower and model.multi_modal_projector stay"),
    "qwen2_5_vl": (LANGUAGE_MODEL, "model.language_model; model.visual stays"),
    "qwen2_audio": (LANGUAGE_MODEL, "model.language_model; model.audio_tower and model.multi_modal_projector stay"),
    # The connector has Llama's names
    "idefics2": (TEXT_MODEL, "model.text_model; model.vision_model and model.connector stay"),
    # The language model is the model itself, and its projections are fused
    "phi4_multimodal": (
        ["model.layers.*.self_attn.o_proj", "model.layers.*.self_attn.qkv_proj"],
        "model; model.embed_tokens_extend stays",
    ),
    # The cross-attention is the language model's, the perceiver is not
    "idefics": (
        [
            "model.gated_cross_attn_layers.*.cross_attn.o_proj",
            "model.gated_cross_attn_layers.*.cross_attn.v_proj",
            "model.layers.*.self_attn.o_proj",
            "model.layers.*.self_attn.v_proj",
        ],
        "model; model.vision_model stays",
    ),
    # Two text models, and a vision tower within the encoder
    "t5gemma2": (
        [
            "model.decoder.layers.*.self_attn.o_proj",
            "model.decoder.layers.*.self_attn.v_proj",
            "model.encoder.text_model.layers.*.self_attn.o_proj",
            "model.encoder.text_model.layers.*.self_attn.v_proj",
        ],
        "model.encoder and model.decoder; model.encoder.vision_tower stays",
    ),
    # A resampler with the text model's config
    "kosmos-2": (
        ["text_model.model.layers.*.self_attn.out_proj", "text_model.model.layers.*.self_attn.v_proj"],
        "text_model; vision_model and image_to_text_projection stay",
    ),
    # By the language model's family, OPT
    "blip-2": (
        [
            "language_model.model.decoder.layers.*.self_attn.out_proj",
            "language_model.model.decoder.layers.*.self_attn.v_proj",
        ],
        "language_model; vision_model, qformer and language_projection stay",
    ),
    # A model around a composite model
    "colpali": (
        ["vlm.language_model.layers.*.self_attn.o_proj", "vlm.language_model.layers.*.self_attn.v_proj"],
        "vlm.language_model; vlm.vision_tower, vlm.multi_modal_projector and embedding_proj_layer stay",
    ),
    "vision-encoder-decoder": (
        ["decoder.bert.encoder.layer.*.attention.output.dense", "decoder.bert.encoder.layer.*.attention.self.value"],
        "decoder; encoder stays",
    ),
}

BART = [
    f"model.{block}.{end}"
    for block in ("decoder.layers.*.encoder_attn", "decoder.layers.*.self_attn", "encoder.layers.*.self_attn")
    for end in ("out_proj", "v_proj")
]
KNOWN = {
    "bart": BART,
    "whisper": BART,
    "albert": [f"albert.encoder.albert_layer_groups.*.albert_layers.*.attention.{end}" for end in ("dense", "value")],
    "deberta": [f"deberta.encoder.layer.*.attention.{end}" for end in ("output.dense", "self.in_proj")],
    "gptj": ["transformer.h.*.attn.out_proj", "transformer.h.*.attn.v_proj"],
    "mpt": ["transformer.blocks.*.attn.Wqkv", "transformer.blocks.*.attn.out_proj"],
    "vit": ["vit.layers.*.attention.o_proj", "vit.layers.*.attention.v_proj"],
    "videomae": [f"videomae.encoder.layer.*.attention.{end}" for end in ("attention.value", "output.dense")],
    "clip_vision_model": ["encoder.layers.*.self_attn.out_proj", "encoder.layers.*.self_attn.v_proj"],
    "wav2vec2": ["wav2vec2.encoder.layers.*.attention.out_proj", "wav2vec2.encoder.layers.*.attention.v_proj"],
    "deepseek_v3": ["model.layers.*.self_attn.kv_b_proj", "model.layers.*.self_attn.o_proj"],
    "modernbert": ["model.layers.*.attn.Wo", "model.layers.*.attn.Wqkv"],
    "longformer": [
        f"longformer.encoder.layer.*.attention.{end}" for end in ("output.dense", "self.value", "self.value_global")
    ],
    "xlm": ["transformer.attentions.*.out_lin", "transformer.attentions.*.v_lin"],
    "rwkv": ["rwkv.blocks.*.attention.output", "rwkv.blocks.*.attention.value"],
}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package logged; transformers has warnings of its own."""
    return [record.message for record in caplog.records if record.name.startswith("sparse_zero.")]


def defaults(model: nn.Module) -> list[str]:
    """The names of the default targets, sorted, with * for the numbers of layers."""
    found = find_targets(model, SparseConfig(), find_modules_to_save(model, SparseConfig()))
    return sorted({re.sub(r"\.\d+(?=\.)", ".*", name.removesuffix(".weight")) for name in found})


@pytest.mark.parametrize("family", COMPOSITE)
def test_the_targets_of_a_composite_model_are_those_of_its_language_model(family, caplog):
    names, told = COMPOSITE[family]
    assert defaults(tiny_family(family)) == names
    (message,) = warnings(caplog)
    assert f"projections of the language {'' if told.startswith('model;') else 'model '}{told} frozen" in message
    assert "to train others, list modules in sparse.targets, e.g. '" in message


def test_the_modules_that_the_warning_names_can_be_targets(caplog):
    model = tiny_family("llava")
    defaults(model)
    (pattern,) = re.findall("'(.*)'", warnings(caplog)[0])
    found = find_targets(model, SparseConfig(targets=[pattern, "self_attn.v_proj"]), [])
    assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in found
    assert "model.language_model.layers.0.self_attn.v_proj.weight" in found


@pytest.mark.parametrize("family", KNOWN)
def test_the_targets_of_a_model_with_one_part(family, caplog):
    assert defaults(tiny_family(family)) == KNOWN[family]
    assert not warnings(caplog)


def test_a_dual_encoder_has_no_language_model_and_trains_both_parts(caplog):
    assert defaults(tiny_family("owlvit")) == [
        *("text_model.encoder.layers.*.self_attn.out_proj", "text_model.encoder.layers.*.self_attn.v_proj"),
        *("vision_model.encoder.layers.*.self_attn.out_proj", "vision_model.encoder.layers.*.self_attn.v_proj"),
    ]
    (message,) = warnings(caplog)
    assert "OwlViTModel has no language model" in message
    assert "projections of all its parts, text_model and vision_model; to train only some" in message


def test_llamas_names_alone_are_targets_of_a_model_that_has_both_projections(caplog):
    # It has cross_attn.v_proj and cross_attn.o_proj as well, which older versions did not take.
    assert defaults(tiny_family("t5gemma")) == [
        *("model.decoder.layers.*.self_attn.o_proj", "model.decoder.layers.*.self_attn.v_proj"),
        *("model.encoder.layers.*.self_attn.o_proj", "model.encoder.layers.*.self_attn.v_proj"),
    ]
    assert not warnings(caplog)


def attention(*names: str, **inner: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in names} | inner)


def test_a_block_without_one_of_the_two_projections_has_no_target():
    model = nn.ModuleDict(
        {
            "whole": nn.ModuleDict({"self_attn": attention("q_proj", "k_proj", "v_proj", "o_proj")}),
            "no_output": nn.ModuleDict({"self_attn": attention("q_proj", "k_proj", "v_proj", "unknown")}),
            "no_value": nn.ModuleDict({"self_attn": attention("q_proj", "unknown", "o_proj")}),
        }
    )
    assert defaults(model) == ["whole.self_attn.o_proj", "whole.self_attn.v_proj"]


def test_a_latent_value_projection_among_llamas_layers_is_a_target():
    # Kimi Linear: some layers have Llama's names, some kv_b_proj and o_proj.
    latent, linear = attention("kv_a_proj", "kv_b_proj", "o_proj"), attention("q_proj", "k_proj", "v_proj", "o_proj")
    model = nn.ModuleDict({"a": nn.ModuleDict({"self_attn": latent}), "b": nn.ModuleDict({"self_attn": linear})})
    assert defaults(model) == [
        "a.self_attn.kv_b_proj",
        "a.self_attn.o_proj",
        "b.self_attn.o_proj",
        "b.self_attn.v_proj",
    ]


def test_a_helper_in_an_attention_block_does_not_share_its_output_projection():
    # DeepSeek V4: the indexer has a kv_proj too.
    model = attention("kv_proj", "o_b_proj", indexer=attention("kv_proj", "gate_proj"))
    assert defaults(nn.ModuleDict({"self_attn": model})) == ["self_attn.kv_proj", "self_attn.o_b_proj"]


def test_the_feed_forward_output_is_no_output_projection(caplog):
    # BERT's layers have output.dense beside attention; here attention lacks its own.
    layer = nn.ModuleDict({"attention": attention("query", "value"), "output": attention("dense")})
    assert defaults(nn.ModuleDict({"layer": layer})) == [
        *("layer.attention.query", "layer.attention.value", "layer.output.dense"),
    ]
    assert "are not known; all linear layers are used as targets" in caplog.text


def test_an_output_projection_in_a_sequential_is_found():
    model = nn.ModuleDict({"attn": attention("to_q", "to_v", to_out=nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0)))})
    assert defaults(model) == ["attn.to_out.0", "attn.to_v"]


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="has no linear layer to select from"):
        defaults(nn.Sequential(nn.Conv2d(3, 4, 1)))
