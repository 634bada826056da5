"""The targets and the fully trained modules of many families of models."""

import logging

import pytest
import torch
from families import DECODERS, ENCODERS, LAYERS, VOCABULARY, tiny
from torch import nn
from transformers import TrainingArguments
from transformers.pytorch_utils import Conv1D

from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig
from sparse_zero.selection.targets import find_modules_to_save, find_targets
from sparse_zero.training.trainer import SparseTrainer

SELF_ATTENTION = [
    f"{stack}.block.{{}}.layer.0.SelfAttention.{end}" for stack in ("encoder", "decoder") for end in ("v", "o")
]
VALUE_AND_OUTPUT = {
    **{
        family: ["model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.o_proj"]
        for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
    },
    **{
        family: [f"{family}.encoder.layer.{{}}.attention.{end}" for end in ("self.value", "output.dense")]
        for family in ("bert", "roberta", "electra")
    },
    "phi": ["model.layers.{}.self_attn.v_proj", "model.layers.{}.self_attn.dense"],
    "phi3": ["model.layers.{}.self_attn.qkv_proj", "model.layers.{}.self_attn.o_proj"],
    "gpt_neox": ["gpt_neox.layers.{}.attention.query_key_value", "gpt_neox.layers.{}.attention.dense"],
    "gpt2": ["transformer.h.{}.attn.c_attn", "transformer.h.{}.attn.c_proj"],
    "opt": ["model.decoder.layers.{}.self_attn.v_proj", "model.decoder.layers.{}.self_attn.out_proj"],
    "falcon": ["transformer.h.{}.self_attention.query_key_value", "transformer.h.{}.self_attention.dense"],
    "bloom": ["transformer.h.{}.self_attention.query_key_value", "transformer.h.{}.self_attention.dense"],
    "distilbert": [f"distilbert.transformer.layer.{{}}.attention.{end}" for end in ("v_lin", "out_lin")],
    "deberta-v2": [f"deberta.encoder.layer.{{}}.attention.{end}" for end in ("self.value_proj", "output.dense")],
    "t5": [*SELF_ATTENTION, *(f"decoder.block.{{}}.layer.1.EncDecAttention.{end}" for end in ("v", "o"))],
}
HEADS = {
    "llama": ["score"],
    "mistral": ["score"],
    "gpt2": ["score"],
    "bert": ["classifier"],
    "roberta": ["classifier"],
    "distilbert": ["pre_classifier", "classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "t5": ["classification_head"],
}


def task_of(family: str) -> str:
    return "seq2seq-lm" if family == "t5" else "sequence-classification" if family in ENCODERS else "causal-lm"


def targets_of(model: nn.Module, targets: str | list[str] | None = None, whole: list[str] | None = None) -> list[str]:
    config = SparseConfig(targets=targets, modules_to_save=whole)
    return [name.removesuffix(".weight") for name in find_targets(model, config, find_modules_to_save(model, config))]


def refusal(model: nn.Module, **settings) -> str:
    """The message of the error that sparsify raises. The model must not change."""
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(UserError) as error:
        sparsify(model, SparseConfig(**settings))
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(p.requires_grad for p in model.parameters())
    return str(error.value)


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS, "t5"])
def test_default_targets_are_the_value_and_output_projections_of_each_layer(family, caplog):
    model = tiny(family, task_of(family))
    expected = {name.format(layer) for layer in range(LAYERS) for name in VALUE_AND_OUTPUT[family]}
    found = targets_of(model)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert not caplog.records


@pytest.mark.parametrize("family", ["bert", "electra", "t5"])
def test_default_targets_of_encoders_and_of_encoder_decoder_models(family):
    if family == "t5":
        found = targets_of(tiny("t5", "sequence-classification"))
        assert len(found) == 6 * LAYERS
    else:
        found = targets_of(tiny(family, "causal-lm"))
        assert len(found) == 2 * LAYERS


@pytest.mark.parametrize(
    ("family", "task"),
    [(f, "causal-lm") for f in DECODERS] + [(f, "sequence-classification") for f in [*ENCODERS, "gpt2", "t5"]],
)
def test_all_linear_is_every_linear_layer_except_the_head(family, task):
    model = tiny(family, task)
    head = [model.get_output_embeddings()] if task == "causal-lm" else []
    heads = HEADS.get(family, []) if task == "sequence-classification" else []
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module not in head
        and not any(name == h or name.startswith(h + ".") for h in heads or ["classifier", "score"])
    ]
    assert targets_of(model, "all-linear") == expected
    assert not {"lm_head", "embed_out", "score", "classifier"} & set(expected)
    assert len(expected) >= 4 * LAYERS


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("v_proj", ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        ("self_attn.v_proj", ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        ("*.0.mlp.*_proj", [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]),
        ("layers.1.*.[qk]_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"]),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        ("lm_head", ["lm_head"]),
    ],
)
def test_patterns(pattern, expected):
    assert targets_of(tiny("llama"), [pattern]) == expected


def test_a_pattern_matches_complete_parts_of_a_name_only():
    assert "matches no module" in refusal(tiny("llama"), targets=["_proj"])


def test_overlapping_patterns_give_each_target_once_in_model_order():
    found = targets_of(tiny("llama"), ["*.1.*.v_proj", "v_proj", "q_proj"])
    attention = "model.layers.{}.self_attn.{}"
    assert found == [attention.format(layer, end) for layer in range(LAYERS) for end in ("q_proj", "v_proj")]


def test_a_pattern_that_matches_several_kinds_of_modules_selects_the_linear_ones():
    model = nn.ModuleDict({"part": nn.ModuleDict({"linear": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})})
    assert targets_of(model, ["part.*"]) == ["part.linear"]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("v_porj", "v_proj"), ("self_attn.value_proj", "self_attn.v_proj"), ("model.layers.7.mlp.up_proj", "up_proj")],
)
def test_a_pattern_that_matches_nothing_lists_similar_names(pattern, near):
    message = refusal(tiny("llama"), targets=["q_proj", pattern])
    assert f"'{pattern}' matches no module" in message
    assert near in message.partition("similar names: ")[2]


def test_a_pattern_without_similar_names_lists_all_names():
    message = refusal(tiny("llama"), targets=["xyz"])
    assert all(name in message for name in ("q_proj", "v_proj", "up_proj"))


def test_a_pattern_that_matches_a_container_is_an_error():
    message = refusal(tiny("bert", "sequence-classification"), targets=["layer.1.attention"])
    assert "matches bert.encoder.layer.1.attention, a BertAttention; use 'layer.1.attention.*'" in message


def test_a_pattern_that_matches_a_module_without_parameters_is_an_error():
    message = refusal(tiny("llama"), targets=["act_fn"])
    assert "matches model.layers.0.mlp.act_fn, a SiLUActivation, which has no parameters" in message


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embed_tokens"], ["model.embed_tokens"]),
        (["norm"], ["model.norm"]),
        (["*norm"], [f"model.layers.{i}.{end}_layernorm" for i in (0, 1) for end in ("input", "post_attention")]),
        (["*.bias"], [f"model.layers.{i}.self_attn.{end}_proj.bias" for i in (0, 1) for end in "qkv"]),
        (["layers.1.self_attn.k_proj.bias", "lm_head"], ["model.layers.1.self_attn.k_proj.bias", "lm_head"]),
        (
            ["experts"],
            [f"model.layers.{i}.mlp.experts.{end}" for i in (0, 1) for end in ("gate_up_proj", "down_proj")],
        ),
        (["experts.down_proj"], [f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1)]),
        (["layers.0.mlp.gate"], ["model.layers.0.mlp.gate"]),
    ],
    ids=["embedding", "norm", "norms", "biases", "one-bias", "experts", "expert-weight", "router"],
)
def test_any_parameter_by_pattern(patterns, expected):
    found = targets_of(tiny("qwen2_moe"), patterns)
    if patterns == ["*norm"]:
        expected = [*expected, "model.norm"]
    assert found == expected


def test_all_linear_includes_the_experts_and_no_norm():
    found = targets_of(tiny("qwen2_moe"), "all-linear")
    assert {name.rpartition(".")[2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "gate_proj", "up_proj"),
        "shared_expert_gate",
    }


def test_all_is_every_parameter_that_is_not_trained_in_full():
    model = tiny("bert", "sequence-classification")
    names = [name for name, _ in model.named_parameters()]
    found = find_targets(model, SparseConfig(targets="all"), ["classifier"])
    assert list(found) == [name for name in names if not name.startswith("classifier.")]


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["layers.0"], ["model.layers.1.self_attn.v_proj"]),
        (["self_attn.q_proj", "*.0.self_attn.v_proj"], ["model.layers.1.self_attn.v_proj"]),
        (["layers.1.self_attn.v_proj.weight"], ["model.layers.0.self_attn.v_proj"]),
    ],
)
def test_excluded_modules_stay_frozen(excluded, left):
    model = tiny("llama")
    config = SparseConfig(targets=["v_proj"], exclude_modules=excluded)
    assert [name.removesuffix(".weight") for name in find_targets(model, config, [])] == left


def test_invalid_exclude_modules():
    assert "no module matches 'self_atn'; similar names: self_attn" in refusal(
        tiny("llama"), exclude_modules=["self_atn"]
    )
    assert "every target is excluded" in refusal(tiny("llama"), targets=["v_proj"], exclude_modules=["layers.?"])


def test_quantized_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=r"1\.weight has dtype int8"):
        sparsify(model, SparseConfig(targets="all-linear"))


def test_a_pattern_that_matches_the_fully_trained_head_is_an_error():
    message = refusal(tiny("bert", "sequence-classification"), targets=["classifier"])
    assert "'classifier' is already trained in full" in message


@pytest.mark.parametrize(
    ("family", "embedding"), [("gpt2", "transformer.wte"), ("gemma", "model.embed_tokens"), ("t5", "shared")]
)
def test_a_tied_weight_is_one_target_by_any_of_its_names(family, embedding):
    model = tiny(family, task_of(family), tie_word_embeddings=True)
    assert targets_of(model, ["lm_head"]) == targets_of(model, [embedding, "lm_head"]) == [embedding]


def test_two_layers_that_share_a_weight_are_one_target():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert targets_of(model, "all-linear") == ["0"]


def test_an_unknown_family_warns_and_falls_back_to_all_linear_layers(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with caplog.at_level(logging.WARNING):
        found = targets_of(model)
    assert found == ["0", "2"]
    assert "the value and output projections of Sequential are not known" in caplog.text


def test_a_model_without_linear_layers_is_refused():
    assert "Sequential has no linear layer" in refusal(nn.Sequential(nn.Embedding(4, 4)))


def test_the_output_projection_of_multihead_attention_is_a_target():
    # Its forward is never called: nn.MultiheadAttention reads the weight itself.
    model = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
    assert targets_of(model, "all-linear") == ["self_attn.out_proj", "linear1", "linear2"]


def test_an_embedding_with_max_norm_is_refused():
    message = refusal(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)), targets=["0"])
    assert "0.weight: an embedding with max_norm" in message


# modules_to_save


@pytest.mark.parametrize("family", sorted(HEADS))
def test_the_head_of_a_sequence_classifier_is_trained_in_full(family):
    assert find_modules_to_save(tiny(family, "sequence-classification"), SparseConfig()) == HEADS[family]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_no_module_of_a_language_model_is_trained_in_full(family):
    assert find_modules_to_save(tiny(family), SparseConfig()) == []


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([], []),
        (["classifier"], ["classifier"]),
        (["embeddings.LayerNorm", "classifier"], ["bert.embeddings.LayerNorm", "classifier"]),
        (["*.layer.0.attention", "layer.0.attention.self"], ["bert.encoder.layer.0.attention"]),
    ],
)
def test_modules_to_save_by_pattern(patterns, expected):
    model = tiny("bert", "sequence-classification")
    assert find_modules_to_save(model, SparseConfig(modules_to_save=patterns)) == expected


def test_fully_trained_modules_are_never_targets():
    model = tiny("bert", "sequence-classification")
    found = targets_of(model, ["attention.self.value", "dense"], whole=["encoder.layer.0"])
    assert found
    assert all(name.startswith(("bert.encoder.layer.1.", "bert.pooler")) for name in found)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("clasifier", "no module matches 'clasifier'; similar names: classifier"),
        ("dropout", "'dropout' has no parameters to train"),
    ],
)
def test_modules_to_save_that_cannot_be_trained_are_refused(pattern, expected):
    model = tiny("bert", "sequence-classification")
    assert expected in refusal(model, modules_to_save=["classifier", pattern])


def test_a_fully_trained_tied_head_trains_the_shared_embedding():
    model = sparsify(tiny("gpt2"), SparseConfig(density=0.2, modules_to_save=["lm_head"]))
    assert model.sparsity.whole == ["transformer.wte.weight"]
    assert model.lm_head.weight.requires_grad
    assert model.sparsity.trainable_parameters == round(0.2 * model.sparsity.total_parameters)


# Properties of the models on which SparseTrainer depends


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_is_a_sum_over_num_items_in_batch(family):
    model = tiny(family).eval()
    tokens = torch.randint(3, VOCABULARY, (2, 9))
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = model(input_ids=tokens, labels=labels, num_items_in_batch=torch.tensor(7))
    losses = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(output.loss, losses / 7)


@pytest.mark.parametrize("family", DECODERS)
def test_the_trainer_sees_that_the_loss_divides_by_num_items_in_batch(family, tmp_path):
    model = sparsify(tiny(family), SparseConfig(density=0.1))
    trainer = SparseTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert trainer.model_accepts_loss_kwargs
    assert trainer._loss_shifts_labels
