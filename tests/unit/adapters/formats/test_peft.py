"""Converting PEFT's SHiRA and Super-Tuning in both directions, checked with PEFT."""

import json
import warnings

import pytest
import torch
from format_cases import CAUSAL, CLASSIFIER, edit, logits, open_base, peft_adapter, save_base, truncate
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from sparse_zero import SparseConfig, UserError, load_adapter, save_adapter, sparsify
from sparse_zero.adapters.files import read_adapter, write_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.formats.supertuning import common_sparsity, scalars_at

CASES = [(method, family) for method in ("shira", "supertuning") for family in ("llama", "bert")]
TASK = {"llama": CAUSAL, "bert": CLASSIFIER, "gpt2": CAUSAL}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: save_base(root / family, family, task) for family, task in TASK.items()}


def ours(base, out, family, seed=0, **settings):
    """Save a sparse-zero adapter with large random deltas."""
    model = sparsify(open_base(base, TASK[family]), SparseConfig(**{"density": 0.03} | settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    save_adapter(model, out)
    return model


def opened_by_peft(base, adapter, family):
    with warnings.catch_warnings(action="error", category=UserWarning):
        return PeftModel.from_pretrained(open_base(base, TASK[family]), adapter)


def scattered(adapter):
    """The deltas of an adapter as dense matrices, in which padding has no effect."""
    dense = {}
    for name, values in adapter.deltas.items():
        dense[name] = torch.zeros(adapter.selection(name).numel, dtype=values.dtype)
        dense[name][adapter.positions(name)] = values
    return dense


@pytest.mark.parametrize(("method", "family"), CASES)
def test_trained_with_peft_opens_here(bases, tmp_path, method, family):
    theirs = peft_adapter(bases[family], tmp_path / "peft", TASK[family], method)
    facts = convert(tmp_path / "peft", tmp_path / "ours")
    model = load_adapter(open_base(bases[family], TASK[family]), tmp_path / "ours")
    assert not torch.allclose(logits(theirs), logits(open_base(bases[family], TASK[family])), atol=1e-2)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    kinds = ("shira_weight", "supertuning_values")
    assert facts["selected_scalars"] == sum(t.numel() for n, t in stored.items() if n.endswith(kinds))
    assert facts["base_model"] == str(bases[family])


@pytest.mark.parametrize(("method", "family"), CASES)
def test_ours_opens_in_peft_with_the_same_logits(bases, tmp_path, method, family):
    model = ours(bases[family], tmp_path / "ours", family)
    facts = convert(tmp_path / "ours", tmp_path / "peft", to=method)
    theirs = opened_by_peft(bases[family], tmp_path / "peft", family)
    assert method == "supertuning" or facts["padding_scalars"] > 0
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    # Also after PEFT's merge
    torch.testing.assert_close(logits(theirs.merge_and_unload()), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["shira", "supertuning"])
def test_a_round_trip_keeps_every_delta(bases, tmp_path, method, dtype):
    ours(bases["bert"], tmp_path / "ours", "bert")
    before = read_adapter(tmp_path / "ours")
    before.deltas = {name: values.to(dtype) for name, values in before.deltas.items()}
    write_adapter(before, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "peft", to=method)
    convert(tmp_path / "peft", tmp_path / "back")
    after = read_adapter(tmp_path / "back")
    one, other = scattered(before), scattered(after)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
        assert one[name].dtype == other[name].dtype == dtype
        # All our scalars are still selected, also those with a delta of zero
        assert torch.isin(before.positions(name), after.positions(name)).all()
    for name, values in before.whole.items():
        assert torch.equal(after.whole[name], values)


def test_between_peft_methods(bases, tmp_path):
    theirs = peft_adapter(bases["llama"], tmp_path / "shira", CAUSAL, "shira")
    convert(tmp_path / "shira", tmp_path / "super", to="supertuning")
    torch.testing.assert_close(
        logits(opened_by_peft(bases["llama"], tmp_path / "super", "llama")), logits(theirs), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("select_top", [True, False])
@pytest.mark.filterwarnings("ignore:save_precomputed_indices")
def test_indices_that_were_not_saved_come_from_the_base(bases, tmp_path, select_top):
    settings = {"save_precomputed_indices": False, "select_top": select_top}
    theirs = peft_adapter(bases["llama"], tmp_path / "peft", CAUSAL, "supertuning", **settings)
    assert not any("indices" in name for name in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    with pytest.raises(UserError, match=r"indices were not saved .* add --base"):
        convert(tmp_path / "peft", tmp_path / "ours")
    facts = convert(tmp_path / "peft", tmp_path / "ours", base=str(bases["llama"]))
    assert facts["notes"] == ["the positions were recomputed from the base model's weights"]
    model = load_adapter(open_base(bases["llama"], CAUSAL), tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)


SHARES = [
    *(((256, 384), (3, 4)), ((10, 7), (1, 7))),
    *(((999_983, 1_000_003), (10_007, 10_009)), ((99_896, 99_896), (101, 7))),
]


@pytest.mark.parametrize(("sizes", "counts"), SHARES)
def test_one_sparsity_for_all(sizes, counts):
    sparsity = common_sparsity(dict(zip("ab", zip(counts, sizes, strict=True), strict=True)))
    held = [scalars_at(sparsity, size) for size in sizes]
    assert all(have >= need for have, need in zip(held, counts, strict=True))
    # It is the largest possible: the weight with the largest fraction has no padding
    assert any(have == need for have, need in zip(held, counts, strict=True))


# Adapters that PEFT does not support


@pytest.mark.parametrize(
    ("family", "settings", "to", "complaint"),
    [
        (
            "llama",
            {"targets": ["norm"], "density": 0.002},
            "shira",
            "'model.norm.weight' (LlamaRMSNorm) is not the weight of one linear",
        ),
        ("gpt2", {}, "shira", "'transformer.h.0.attn.c_attn.weight' (Conv1D) is not the weight of one linear layer"),
        ("gpt2", {}, "supertuning", "use `--to sparta` or `sparse-zero merge`"),
        ("llama", {"targets": ["embed_tokens"]}, "shira", "'model.embed_tokens.weight' (Embedding) is not"),
        ("llama", {"trainable_token_indices": [4, 5]}, "shira", "weight' has fully trained rows"),
        (
            "bert",
            {"targets": ["self.query.bias", "self.value"]},
            "supertuning",
            "query.bias' (Linear) is not the weight",
        ),
        ("llama", {"targets": ["v_proj"], "density": 0.036}, "shira", "has fewer than SHiRA's r * (in + out)"),
    ],
)
def test_what_peft_cannot_hold(bases, tmp_path, family, settings, to, complaint):
    ours(bases[family], tmp_path / "ours", family, **settings)
    with pytest.raises(UserError) as refused:
        convert(tmp_path / "ours", tmp_path / "peft", to=to)
    assert complaint in str(refused.value)
    assert str(tmp_path / "ours") in str(refused.value)
    assert not list(tmp_path.glob("peft*"))


def test_tied_weights_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "llama", CAUSAL, tie_word_embeddings=True)
    ours(base, tmp_path / "ours", "llama", modules_to_save=["lm_head"], density=0.4)
    with pytest.raises(UserError, match=r"'model.embed_tokens.weight' is tied and fully trained"):
        convert(tmp_path / "ours", tmp_path / "peft", to="shira")
    ours(base, tmp_path / "selected", "llama", targets=["lm_head"])
    with pytest.raises(UserError, match=r"\(Embedding and Linear\) is not the weight of one linear layer"):
        convert(tmp_path / "selected", tmp_path / "peft", to="shira")


# Damaged or wrong input

FILE = "adapter_model.safetensors"


def edited(change):
    """What changes the tensors of an adapter in some directory."""
    return lambda directory: edit(directory / FILE, change)


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: truncate(d / FILE), "adapter_model.safetensors: damaged"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json: damaged"),
        (edited(lambda t: t.pop(first(t, "_indices"))), "the indices of 'model.layers.0."),
        (edited(lambda t: t[first(t, "_indices")].fill_(0)), "contain duplicates"),
        (edited(lambda t: t[first(t, "_indices")].fill_(-1)), "are not valid for a weight of shape"),
        (
            edited(lambda t: t[first(t, "_indices")].fill_(10**6)),
            "are not valid for a weight of shape",
        ),
        (edited(lambda t: t.update(odd=torch.zeros(1))), "'odd' is not a name that PEFT writes"),
    ],
)
def test_damaged(bases, tmp_path, damage, complaint):
    peft_adapter(bases["llama"], tmp_path / "peft", CAUSAL, "shira")
    damage(tmp_path / "peft")
    with pytest.raises(UserError) as refused:
        convert(tmp_path / "peft", tmp_path / "ours")
    assert complaint in str(refused.value)
    assert str(tmp_path / "peft") in str(refused.value)
    assert not (tmp_path / "ours").exists()


def test_wrong_base(bases, tmp_path):
    peft_adapter(bases["llama"], tmp_path / "peft", CAUSAL, "shira")
    with pytest.raises(UserError, match=r"is not a parameter of GPT2LMHeadModel .*with --base"):
        convert(tmp_path / "peft", tmp_path / "ours", base=str(bases["gpt2"]))
    smaller = save_base(tmp_path / "smaller", "llama", CAUSAL, hidden_size=8, head_dim=4)
    with pytest.raises(UserError, match="are not valid for a weight of shape"):
        convert(tmp_path / "peft", tmp_path / "ours", base=str(smaller))
    ours(bases["llama"], tmp_path / "own", "llama")
    (smaller / "model.safetensors").unlink()
    for other, complaint in (
        (smaller, r"has shape \[8, 16\] in the adapter and \[4, 8\]"),
        (bases["gpt2"], "is not a parameter of GPT2"),
    ):
        with pytest.raises(UserError, match=rf"'model.layers.0.self_attn.v_proj.weight' {complaint}.*with --base"):
            convert(tmp_path / "own", tmp_path / "peft2", to="shira", base=str(other))
    with pytest.raises(UserError, match=r"nowhere cannot be loaded.*--base"):
        convert(tmp_path / "peft", tmp_path / "ours", base="./nowhere")


def test_the_base_models_weights_are_known_from_then_on(bases, tmp_path):
    peft_adapter(bases["bert"], tmp_path / "peft", CLASSIFIER, "shira")
    convert(tmp_path / "peft", tmp_path / "ours")
    other = save_base(tmp_path / "other", "bert", CLASSIFIER, initializer_range=0.5)
    before = open_base(other, CLASSIFIER)
    with pytest.raises(UserError, match="this model has different weights"):
        load_adapter(before, tmp_path / "ours")
    with pytest.raises(UserError, match=r"trained on a model with different weights than .*other: 'bert\."):
        convert(tmp_path / "ours", tmp_path / "back", to="shira", base=str(other))
    convert(tmp_path / "ours", tmp_path / "back", to="shira", base=str(bases["bert"]))


@pytest.mark.parametrize("supra", [False, True])
def test_low_rank_parts_are_refused(bases, tmp_path, supra):
    if supra:
        peft_adapter(bases["llama"], tmp_path / "peft", CAUSAL, "supertuning", r=2)
    else:
        get_peft_model(open_base(bases["llama"], CAUSAL), LoraConfig(target_modules=["v_proj"])).save_pretrained(
            tmp_path / "peft"
        )
    with pytest.raises(UserError) as refused:
        convert(tmp_path / "peft", tmp_path / "ours")
    message = str(refused.value)
    assert "adapter_config.json" in message
    assert ("Supra" if supra else "LORA") in message
    assert "merge_and_unload" in message


def test_a_config_says_what_peft_needs(bases, tmp_path):
    ours(bases["bert"], tmp_path / "ours", "bert")
    convert(tmp_path / "ours", tmp_path / "peft", to="shira")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier"]
    assert config["base_model_name_or_path"] == str(bases["bert"])
    assert config["target_modules"][0] == "bert.encoder.layer.0.attention.self.value"


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_heads_of_several_layers(tmp_path, family):
    base = save_base(tmp_path / "base", family, CLASSIFIER, max_position_embeddings=70)
    model = sparsify(open_base(base, CLASSIFIER), SparseConfig(density=0.12))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    save_adapter(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "peft", to="supertuning")
    theirs = PeftModel.from_pretrained(open_base(base, CLASSIFIER), tmp_path / "peft")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    convert(tmp_path / "peft", tmp_path / "back")
    opened = load_adapter(open_base(base, CLASSIFIER), tmp_path / "back")
    torch.testing.assert_close(logits(opened), logits(model), rtol=0, atol=1e-6)


def test_converted_shira_is_never_read_wrongly(bases, tmp_path):
    """transformers leaves out the indices of SHiRA. With a mask of type "random", PEFT would draw others."""
    model = ours(bases["llama"], tmp_path / "ours", "llama")
    facts = convert(tmp_path / "ours", tmp_path / "shira", to="shira")
    torch.testing.assert_close(logits(opened_by_peft(bases["llama"], tmp_path / "shira", "llama")), logits(model))
    plain = open_base(bases["llama"], CAUSAL)
    plain.load_adapter(str(tmp_path / "shira"))
    with pytest.raises(KeyError):
        logits(plain)
    assert any("PeftModel.from_pretrained" in note for note in facts["notes"])
    assert "PeftModel.from_pretrained" in (tmp_path / "shira" / "README.md").read_text()


def test_converted_supertuning_is_read_right_by_transformers(bases, tmp_path):
    model = ours(bases["llama"], tmp_path / "ours", "llama")
    convert(tmp_path / "ours", tmp_path / "supertuning", to="supertuning")
    plain = open_base(bases["llama"], CAUSAL)
    plain.load_adapter(str(tmp_path / "supertuning"))
    torch.testing.assert_close(logits(plain.eval()), logits(model), rtol=0, atol=1e-6)
