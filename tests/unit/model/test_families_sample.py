"""A sample of the families that `make families` checks, from every kind of model."""

import copy
import functools

import pytest
from family_check import OK, REFUSED, TARGETS, WRONG, Dense, Outcome, check

SAMPLE = [
    # Decoders: dense, fused, latent attention, experts, parallel blocks, recurrent, hybrid
    *(
        "llama",
        "gemma2",
        "gpt2",
        "gpt_neox",
        "falcon",
        "phi3",
        "deepseek_v3",
        "mixtral",
        "qwen3_moe",
        "gpt_oss",
        "mpt",
    ),
    *("gptj", "mamba", "rwkv", "lfm2"),
    # Encoders, and encoders with decoders
    *("bert", "deberta-v2", "albert", "modernbert", "bart", "whisper"),
    # Towers and composite models
    *("vit", "convnext", "clip", "wav2vec2", "llava", "qwen2_audio"),
]


@functools.cache
def dense(family: str) -> Dense:
    return Dense(family)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", SAMPLE)
def test_a_sparse_model_computes_saves_loads_merges_and_unloads_as_a_dense_one(family, targets):
    assert check(dense(family), TARGETS[targets]) == Outcome(OK)


def test_a_gradient_that_differs_is_found():
    wrong = copy.copy(dense("llama"))
    name = "model.layers.0.self_attn.v_proj.weight"
    wrong.gradients = wrong.gradients | {name: wrong.gradients[name] * 1.01}
    outcome = check(wrong, None)
    assert outcome.kind == WRONG
    assert f"the gradient of {name} differs by" in outcome.detail


def test_a_model_without_linear_layers_is_refused_in_one_sentence():
    outcome = check(dense("univnet"), "all-linear")
    assert outcome == Outcome(REFUSED, "sparse.targets: UnivNetModel has no linear layer to select from")
