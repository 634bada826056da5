"""Converting adapters to PEFT's LoRA, checked with PEFT."""

import json
import sys
import warnings

import pytest
import torch
from format_cases import CAUSAL, CLASSIFIER, logits, open_base, save_base
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from launcher.cli import main
from sparse_zero import SparseConfig, UserError, save_adapter, sparsify
from sparse_zero.adapters.files import read_adapter, write_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.formats.lora_factors import Factored

WEIGHTS = {
    "llama": ["proj"],
    "gpt2": ["attn.c_attn", "mlp.c_proj"],
    "bert": ["query", "dense"],
    "mixtral": ["v_proj", "experts.gate_up_proj", "experts.down_proj"],
    "qwen2_moe": ["shared_expert.down_proj", "mlp.experts.down_proj"],
    "gpt_oss": ["o_proj", "experts.gate_up_proj", "experts.down_proj"],
    "qwen3_moe": ["o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "experts.gate_up_proj"],
    "deepseek_v3": ["o_proj", "mlp.down_proj", "shared_experts.down_proj", "shared_experts.up_proj"],
    "gemma": ["o_proj", "embed_tokens"],
}
SETTINGS = {
    "mixtral": {"num_local_experts": 3},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8},
    "gemma": {"tie_word_embeddings": False},
    "qwen3_moe": {
        **{"num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
        **{"moe_intermediate_size": 12, "head_dim": 8},
    },
    "deepseek_v3": {
        **{"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        **{"moe_intermediate_size": 12, "kv_lora_rank": 8, "q_lora_rank": 8, "num_key_value_heads": 2},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    },
}


def assert_close(found, expected):
    """Equal to 1e-6 of the largest logit, or of 1."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * max(1, float(expected.abs().max())))


def task_of(family):
    return CLASSIFIER if family == "bert" else CAUSAL


def input_dimension(model, name, parameter):
    """The dimension of a weight along which its layer's inputs lie."""
    module = model.get_submodule(name.rpartition(".")[0])
    is_transposed = isinstance(module, Conv1D | nn.Embedding) or getattr(module, "is_transposed", False)
    return parameter.dim() - 2 if is_transposed else parameter.dim() - 1


def positions_in_columns(model, endings):
    """Some scalars of a few input columns of each weight, of other columns in each weight and matrix: 2 or 3 columns
    by turns, and one less in an embedding.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not name.removesuffix(".weight").endswith(tuple(endings)):
            continue
        dimension, mask = input_dimension(model, name, parameter), torch.zeros(parameter.shape, dtype=torch.bool)
        for matrix in mask.unsqueeze(0) if mask.dim() == 2 else mask:
            columns = matrix.movedim(dimension - mask.dim(), 0)
            columns[torch.randperm(len(columns), generator=generator)[: 2 + len(found) % 2]] = True
        mask &= torch.rand(mask.shape, generator=generator) < 0.8
        found[name] = mask.flatten().nonzero().flatten()
    return found


def ours(base, out, family, endings=None, positions=None, **settings):
    """Save an adapter with large random deltas. Returns: the sparse model."""
    model = open_base(base, task_of(family))
    positions = positions or positions_in_columns(model, endings or WEIGHTS[family])
    sparsify(model, SparseConfig(**settings), positions=positions)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    save_adapter(model, out)
    return model


def opened_by_peft(base, adapter, family):
    with warnings.catch_warnings(action="error", category=UserWarning):
        return PeftModel.from_pretrained(open_base(base, task_of(family)), adapter)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(root / name, name, task_of(name), **SETTINGS.get(name, {})) for name in WEIGHTS}


@pytest.mark.parametrize("family", WEIGHTS)
def test_peft_has_the_same_logits(bases, tmp_path, family):
    model = ours(bases[family], tmp_path / "ours", family)
    facts = convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    theirs = opened_by_peft(bases[family], tmp_path / "lora", family)
    assert not torch.allclose(logits(model), logits(open_base(bases[family], task_of(family))), atol=1e-2)
    assert_close(logits(theirs), logits(model))
    with theirs.disable_adapter():
        if family != "bert":  # its trained head stays
            base = logits(open_base(bases[family], task_of(family)))
            torch.testing.assert_close(logits(theirs), base, rtol=0, atol=0)
    # The weights themselves are those of our merge, bit for bit
    assert_close(logits(theirs.merge_and_unload()), logits(model))
    # 2 columns or 3, and all experts as many as the one with the most
    assert (facts["smallest_rank"], facts["largest_rank"]) in ((2, 3), (3, 3))
    assert facts["lora_bytes"] == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("with_tables", [True, False])
def test_dense_layers_that_peft_takes_for_experts(bases, tmp_path, monkeypatch, with_tables):
    """By their names, in models whose experts once had the same names: only these, and no other weight."""
    model = ours(bases["qwen3_moe"], tmp_path / "ours", "qwen3_moe", ["mlp.down_proj"])
    if not with_tables:
        monkeypatch.setitem(sys.modules, "peft.utils.transformers_weight_conversion", None)
    facts = convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    monkeypatch.undo()
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["model.layers.0.mlp.down_proj.weight"]
    assert "vLLM may not load 'model.layers.0.mlp.down_proj.weight'" in facts["serving"]
    assert_close(logits(opened_by_peft(bases["qwen3_moe"], tmp_path / "lora", "qwen3_moe")), logits(model))


def test_other_layers_of_these_names_stay_modules(bases, tmp_path):
    """So that vLLM loads them."""
    ours(bases["qwen2_moe"], tmp_path / "ours", "qwen2_moe", ["shared_expert.down_proj"])
    facts = convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert "vLLM needs --max-lora-rank 3" in facts["serving"]


def test_the_difference_is_exact(bases, tmp_path):
    """B A is the dense difference bit for bit, by a product in float64."""
    ours(bases["llama"], tmp_path / "ours", "llama")
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    adapter, tensors = read_adapter(tmp_path / "ours"), load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, values in adapter.deltas.items():
        layer = "base_model.model." + name.removesuffix(".weight")
        dense = torch.zeros(adapter.selection(name).numel)
        dense[adapter.positions(name)] = values
        product = tensors[f"{layer}.lora_B.weight"].double() @ tensors[f"{layer}.lora_A.weight"].double()
        assert torch.equal(product.float(), dense.view(adapter.selection(name).shape))


def test_transformers_opens_it_too(bases, tmp_path):
    model = ours(bases["llama"], tmp_path / "ours", "llama")
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    theirs = open_base(bases["llama"], CAUSAL)
    theirs.load_adapter(str(tmp_path / "lora"))
    assert_close(logits(theirs), logits(model))


def test_a_second_adapter_in_peft(bases, tmp_path):
    one = ours(bases["llama"], tmp_path / "one", "llama", ["v_proj"])
    other = ours(bases["llama"], tmp_path / "other", "llama", ["v_proj", "up_proj"])
    for name in ("one", "other"):
        convert(tmp_path / name, tmp_path / f"{name}-lora", to="lora")
    theirs = opened_by_peft(bases["llama"], tmp_path / "one-lora", "llama")
    theirs.load_adapter(tmp_path / "other-lora", "other")
    assert_close(logits(theirs), logits(one))
    theirs.set_adapter("other")
    assert_close(logits(theirs), logits(other))


def test_conv1d_and_linear_in_one_adapter(tmp_path):
    """PEFT has one fan_in_fan_out for the model, and corrects it with a warning at each layer."""
    base = save_base(tmp_path / "base", "gpt2", CAUSAL, tie_word_embeddings=False)
    model = ours(base, tmp_path / "ours", "gpt2", ["attn.c_attn", "lm_head"])
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        theirs = PeftModel.from_pretrained(open_base(base, CAUSAL), tmp_path / "lora")
    assert_close(logits(theirs), logits(model))


def test_modules_trained_in_full(tmp_path):
    base = save_base(tmp_path / "base", "llama", CAUSAL, tie_word_embeddings=False)
    model = ours(base, tmp_path / "ours", "llama", ["v_proj"], modules_to_save=["norm", "lm_head"])
    facts = convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert_close(logits(opened_by_peft(base, tmp_path / "lora", "llama")), logits(model))
    assert "vLLM does not load parameters trained in full ('model." in facts["serving"]


def test_rows_of_known_tokens(tmp_path):
    """Rows that were trained in full have values, not differences."""
    base = save_base(tmp_path / "base", "llama", CAUSAL, tie_word_embeddings=False)
    settings = {"targets": ["v_proj"], "density": 0.0095, "trainable_token_indices": [4, 5]}
    model = sparsify(open_base(base, CAUSAL), SparseConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert_close(logits(opened_by_peft(base, tmp_path / "lora", "llama")), logits(model))


def test_few_outputs_instead_of_few_inputs(bases, tmp_path):
    """Any adapter has at most rank min(in, out): here two rows of a weight, over all of its columns."""
    name = "model.layers.0.mlp.up_proj.weight"
    model = ours(bases["llama"], tmp_path / "ours", "llama", positions={name: torch.arange(16, 48)})
    facts = convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert facts["largest_rank"] == 2
    theirs = opened_by_peft(bases["llama"], tmp_path / "lora", "llama")
    assert_close(logits(theirs), logits(model))


def test_from_another_format(bases, tmp_path):
    """A fine-tuned model whose changes lie in three columns."""
    tuned = open_base(bases["llama"], CAUSAL)
    with torch.no_grad():
        tuned.model.layers[1].self_attn.o_proj.weight[:, [1, 5, 6]] += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    facts = convert(tmp_path / "tuned", tmp_path / "lora", to="lora", base=str(bases["llama"]))
    assert facts["largest_rank"] == 3
    theirs = opened_by_peft(bases["llama"], tmp_path / "lora", "llama")
    assert_close(logits(theirs), logits(tuned))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_deltas_is_kept(bases, tmp_path, dtype):
    ours(bases["llama"], tmp_path / "ours", "llama")
    adapter = read_adapter(tmp_path / "ours")
    adapter.deltas = {name: values.to(dtype) for name, values in adapter.deltas.items()}
    write_adapter(adapter, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert {t.dtype for t in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {dtype}


def test_the_command_says_what_serving_needs(bases, tmp_path, capsys):
    ours(bases["llama"], tmp_path / "ours", "llama")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "lora"), "--to", "lora"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "largest rank 3" in printed
    assert "vLLM needs --max-lora-rank 3 or more" in printed
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "second"), "--to", "lora", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["smallest_rank"], facts["to"]) == (2, "PEFT LoRA")


@pytest.mark.parametrize("by", ["columns", "rows"])
def test_factors_of_matrices_with_different_ranks(by):
    """Against a product of dense matrices, with fewer columns than rows or the reverse."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(4, 6, 9, generator=generator)
    touched = torch.zeros(4, 6, 9, dtype=torch.bool)
    for matrix, count in enumerate([1, 3, 2, 3]):
        lines = touched[matrix].T if by == "columns" else touched[matrix]
        lines[torch.randperm(len(lines), generator=generator)[:count]] = True
    coordinates = touched.nonzero(as_tuple=True)
    weight = Factored((4, 6, 9), coordinates, dense[coordinates])
    assert weight.rank == 3
    for rank in (3, 5):
        factor_a, factor_b = weight.factors(rank)
        assert (factor_a.shape, factor_b.shape) == ((4, rank, 9), (4, 6, rank))
        assert torch.equal(factor_b @ factor_a, dense * touched)


# What PEFT's LoRA cannot hold


@pytest.mark.parametrize(
    ("family", "settings", "complaint"),
    [
        ("llama", {"targets": ["norm"], "density": 0.002}, "'model.norm.weight' (LlamaRMSNorm) is not the weight of"),
        ("bert", {"targets": ["query.bias", "value"]}, "query.bias' (Linear) is not the weight of a linear layer"),
        ("llama", {"targets": ["v_proj", "o_proj"], "density": 0.03}, "more than the 768 of the weights themselves"),
        (
            "llama",
            {"density": 0.03},
            "v_proj.weight', 8 x 16, need rank 8); train with fewer columns (sparse.columns), or",
        ),
    ],
)
def test_what_lora_cannot_hold(bases, tmp_path, family, settings, complaint):
    model = sparsify(open_base(bases[family], task_of(family)), SparseConfig(**settings))
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(UserError) as refused:
        convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert complaint in str(refused.value)
    assert str(tmp_path / "ours") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("lora*"))


def test_tied_weights_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "llama", CAUSAL, tie_word_embeddings=True)
    ours(base, tmp_path / "ours", "llama", ["embed_tokens"])
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight' is tied \(Embedding and Linear\)"):
        convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    ours(base, tmp_path / "whole", "llama", ["v_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight' is tied and fully trained"):
        convert(tmp_path / "whole", tmp_path / "lora", to="lora")


def test_an_embedding_that_looks_up_other_rows_is_refused(tmp_path):
    """OPT adds 2 to the position before it looks it up; PEFT's embedding does not."""
    base = save_base(tmp_path / "base", "opt", CAUSAL)
    ours(base, tmp_path / "ours", "opt", ["embed_positions"])
    with pytest.raises(UserError, match=r"embed_positions.weight' \(OPTLearnedPositionalEmbedding\) is not"):
        convert(tmp_path / "ours", tmp_path / "lora", to="lora")


def test_a_router_that_is_a_linear_layer_is_refused(tmp_path):
    base = save_base(tmp_path / "base", "phimoe", CAUSAL, num_local_experts=3, num_experts_per_tok=2)
    ours(base, tmp_path / "ours", "phimoe", ["router"])
    with pytest.raises(UserError, match=r"router.weight' \(PhimoeTopKRouter\) is not the weight of a linear layer"):
        convert(tmp_path / "ours", tmp_path / "lora", to="lora")


def test_linear_layers_with_another_forward(tmp_path):
    """Falcon's have the same product."""
    base = save_base(tmp_path / "base", "falcon", CAUSAL)
    model = ours(base, tmp_path / "ours", "falcon", ["dense"])
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    assert_close(logits(opened_by_peft(base, tmp_path / "lora", "falcon")), logits(model))


def test_lora_is_not_read(bases, tmp_path):
    ours(bases["llama"], tmp_path / "ours", "llama")
    convert(tmp_path / "ours", tmp_path / "lora", to="lora")
    with pytest.raises(UserError, match="LORA adapters change all scalars of a weight"):
        convert(tmp_path / "lora", tmp_path / "back")
