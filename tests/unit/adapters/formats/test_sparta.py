"""Converting adapters of the reference implementation, peft-sparta, in both directions."""

import contextlib
import io
import json

import pytest
import torch
from families import VOCABULARY
from format_cases import (
    CAUSAL,
    CLASSIFIER,
    SPARTA_FROZEN,
    edit,
    logits,
    open_base,
    save_base,
    save_sparta,
    sparta_adapter,
    tokens,
    train,
    truncate,
)
from peft_sparta import SpaRTA, SpaRTAforCausalLM, SpaRTAforSequenceClassification
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from sparse_zero import SparseConfig, UserError, load_adapter, save_adapter, sparsify
from sparse_zero.adapters.files import read_adapter, read_config
from sparse_zero.adapters.formats.convert import convert


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {task: save_base(root / task, "llama", task) for task in (CAUSAL, CLASSIFIER)}


def ours(base, out, task, **settings):
    model = sparsify(open_base(base, task), SparseConfig(**{"density": 0.03} | settings))
    train(model, task)
    save_adapter(model, out)
    return model


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    state = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, state[name]), name


def as_pickles(adapter):
    """Replace the files by the older `.pt` files with the same contents."""
    kinds = {"indices": {}, "deltas": {}}
    for name, tensor in load_file(adapter / "sparse_deltas.safetensors").items():
        kind, _, parameter = name.partition(".")
        kinds[kind][parameter] = tensor.clone()
    torch.save(kinds, adapter / "sparse_deltas.pt")
    (adapter / "sparse_deltas.safetensors").unlink()
    for name in ("head", "new_embeddings"):
        path = adapter / f"{name}_init.safetensors"
        if path.exists():
            torch.save(load_file(path)[name], path.with_suffix(".pt"))
            path.unlink()


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", [CAUSAL, CLASSIFIER])
def test_trained_with_the_reference_opens_here(bases, tmp_path, task, dtype, pickled):
    theirs = sparta_adapter(bases[task], tmp_path / "sparta", task, dtype)
    if pickled:
        as_pickles(tmp_path / "sparta")
    convert(tmp_path / "sparta", tmp_path / "ours")
    assert {values.dtype for values in read_adapter(tmp_path / "ours").deltas.values()} == {dtype}
    model = load_adapter(open_base(bases[task], task), tmp_path / "ours")
    assert not torch.allclose(logits(theirs.model), logits(open_base(bases[task], task)), atol=1e-2)
    torch.testing.assert_close(logits(model), logits(theirs.model), rtol=0, atol=1e-6)
    config = read_config(tmp_path / "ours")
    assert config.base_model_name_or_path == str(bases[task])
    assert config.task == task
    assert config.modules_to_save == (["score.weight"] if task == CLASSIFIER else [])


@pytest.mark.parametrize("settings", [{"targets": "all"}, {"trainable_token_indices": [4, 9]}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_causal_opens_in_the_reference(tmp_path, family, settings):
    base = tmp_path / "base"
    save_base(base, family, CAUSAL)
    # The reference works in bfloat16: with a bfloat16 base it has the same weights bit for bit
    open_base(base, CAUSAL, torch.bfloat16).save_pretrained(base)
    ours(base, tmp_path / "ours", CAUSAL, **settings)
    convert(tmp_path / "ours", tmp_path / "sparta", to="sparta")
    theirs = SpaRTAforCausalLM(str(tmp_path / "sparta"))
    model = load_adapter(open_base(base, CAUSAL, torch.bfloat16), tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(theirs.base_model), rtol=0, atol=0)
    assert_same_weights(theirs.base_model, model)


@pytest.mark.parametrize("new_tokens", [[], ["<one>", "<two>"]])
def test_classifier_opens_in_the_reference(bases, tmp_path, new_tokens):
    base = open_base(bases[CLASSIFIER], CLASSIFIER)
    rows = list(range(VOCABULARY, VOCABULARY + len(new_tokens)))
    if new_tokens:
        base.resize_token_embeddings(VOCABULARY + len(new_tokens))
    # The reference only uses bfloat16
    trained = sparsify(base, SparseConfig(density=0.04, trainable_token_indices=rows or None))
    trained.sparsity.base_model = str(bases[CLASSIFIER])
    trained.sparsity.new_tokens = new_tokens
    train(trained, CLASSIFIER)
    save_adapter(trained, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "sparta", to="sparta")
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = SpaRTAforSequenceClassification(str(tmp_path / "sparta"))
    assert len(theirs.tokenizer) == VOCABULARY + len(new_tokens)

    model = open_base(bases[CLASSIFIER], CLASSIFIER, torch.bfloat16)
    if new_tokens:
        model.resize_token_embeddings(VOCABULARY + len(new_tokens))
    model = load_adapter(model, tmp_path / "ours")
    logits(model)  # writes the deltas into the weights
    assert_same_weights(theirs.base_model, model.model)
    assert torch.equal(theirs.head.weight, read_adapter(tmp_path / "ours").whole["score.weight"])
    batch = tokens(vocabulary=VOCABULARY + len(new_tokens))
    with torch.no_grad():
        here = model(input_ids=batch).logits.float()
    torch.testing.assert_close(theirs(batch, torch.ones_like(batch)), here, rtol=0.02, atol=0.02)


def test_new_tokens_of_the_reference(bases, tmp_path):
    inner = open_base(bases[CLASSIFIER], CLASSIFIER)
    inner.config.problem_type = "single_label_classification"
    inner.config.id2label, inner.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    tokenizer = AutoTokenizer.from_pretrained(bases[CLASSIFIER])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>"]})
    embeddings = inner.get_input_embeddings()
    init = (0.1 * torch.randn(2, 16)).to(torch.bfloat16)
    embeddings.weight.data = torch.cat([embeddings.weight.data, init.float()])
    embeddings.num_embeddings += 2
    inner.config.vocab_size += 2
    # embed_tokens is not frozen: scalars of other tokens are selected too
    frozen = [name for name in SPARTA_FROZEN if name != "embed_tokens"]
    theirs = SpaRTA(inner, 0.8, frozen_modules=frozen, trainable_tokens=[VOCABULARY, VOCABULARY + 1])
    batch = tokens(vocabulary=VOCABULARY + 2)
    batch[:, 2], batch[:, 4] = VOCABULARY, VOCABULARY + 1
    optimizer = torch.optim.SGD(theirs.parameters(), lr=1.0)
    theirs(input_ids=batch, labels=batch[:, 0] % 2).loss.backward()
    optimizer.step()
    save_sparta(theirs, tmp_path / "sparta")
    torch.save(init, tmp_path / "sparta" / "new_embeddings_init.pt")
    tokenizer.save_pretrained(tmp_path / "sparta")

    convert(tmp_path / "sparta", tmp_path / "ours")
    config = read_config(tmp_path / "ours")
    assert config.new_tokens == ["<a>", "<b>"]
    assert config.model_settings["id2label"] == {0: "bad", 1: "good"}
    assert config.tensors["model.embed_tokens.weight"].whole_rows == [VOCABULARY, VOCABULARY + 1]
    model = open_base(bases[CLASSIFIER], CLASSIFIER)
    model.resize_token_embeddings(VOCABULARY + 2)
    load_adapter(model, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=batch).logits, theirs.model(input_ids=batch).logits, rtol=0, atol=1e-6
        )
    # And back again
    convert(tmp_path / "ours", tmp_path / "back", to="sparta")
    with contextlib.redirect_stdout(io.StringIO()):
        again = SpaRTAforSequenceClassification(str(tmp_path / "back"))
        before = SpaRTAforSequenceClassification(str(tmp_path / "sparta"))
    assert_same_weights(again.base_model, before.base_model)
    torch.testing.assert_close(again.head.weight, before.head.weight, rtol=0, atol=0)
    assert again.id2label == before.id2label


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_keeps_every_delta(bases, tmp_path, dtype):
    sparta_adapter(bases[CAUSAL], tmp_path / "sparta", CAUSAL, dtype)
    convert(tmp_path / "sparta", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="sparta")
    one, other = (load_file(tmp_path / place / "sparse_deltas.safetensors") for place in ("sparta", "back"))
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name
    one, other = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("sparta", "back"))
    assert one["sparta_pretrained_model"] == other["sparta_pretrained_model"]
    assert one["architectures"] == other["architectures"]


def test_a_module_trained_whole_becomes_deltas_of_all_its_scalars(bases, tmp_path):
    model = ours(bases[CAUSAL], tmp_path / "ours", CAUSAL, modules_to_save=["lm_head"], density=0.3)
    convert(tmp_path / "ours", tmp_path / "sparta", to="sparta")
    theirs = SpaRTAforCausalLM(str(tmp_path / "sparta"))
    # The reference's base is in bfloat16
    torch.testing.assert_close(theirs.base_model.lm_head.weight.float(), model.lm_head.weight, rtol=2**-7, atol=1e-3)


def test_a_head_without_its_initial_values_is_a_change_of_the_base(bases, tmp_path):
    theirs = sparta_adapter(bases[CLASSIFIER], tmp_path / "sparta", CLASSIFIER)
    (tmp_path / "sparta" / "head_init.safetensors").unlink()
    convert(tmp_path / "sparta", tmp_path / "ours")
    model = load_adapter(open_base(bases[CLASSIFIER], CLASSIFIER), tmp_path / "ours")
    torch.testing.assert_close(logits(model), logits(theirs.model), rtol=0, atol=1e-6)


# Adapters that the reference does not support


def test_other_heads_are_refused(tmp_path):
    base = save_base(tmp_path / "base", "bert", CLASSIFIER)
    ours(base, tmp_path / "ours", CLASSIFIER)
    with pytest.raises(UserError, match=r"'classifier.weight': .* a linear layer `score` .* BertForSequence"):
        convert(tmp_path / "ours", tmp_path / "sparta", to="sparta")


def test_new_tokens_of_a_causal_model_are_refused(bases, tmp_path):
    model = open_base(bases[CAUSAL], CAUSAL)
    model.resize_token_embeddings(VOCABULARY + 1)
    save_adapter(sparsify(model, SparseConfig(trainable_token_indices=[VOCABULARY])), tmp_path / "ours")
    with pytest.raises(UserError, match=r"has 1 rows of new tokens, .* `sparse-zero merge`"):
        convert(tmp_path / "ours", tmp_path / "sparta", to="sparta")


# Damaged or wrong input

FILE = "sparse_deltas.safetensors"


def edited(change):
    """What changes the tensors of an adapter in some directory."""
    return lambda directory: edit(directory / FILE, change)


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def harmful(directory):
    (directory / "sparse_deltas.safetensors").unlink()
    torch.save(Harmful(), directory / "sparse_deltas.pt")


NAME = "model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda d: truncate(d / "sparse_deltas.safetensors"), "sparse_deltas.safetensors: damaged"),
        (lambda d: truncate(d / "head_init.safetensors"), "head_init.safetensors: damaged"),
        (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
        (lambda d: truncate(d / "config.json"), "config.json: damaged"),
        (harmful, "sparse_deltas.pt: damaged, or contains other objects than tensors"),
        (
            edited(lambda t: t.update(odd=torch.zeros(1))),
            "contains deltas, indices, odd, not indices and",
        ),
        (edited(lambda t: t.pop(f"deltas.{NAME}")), f"'{NAME}' has only one of indices and deltas"),
        (
            edited(lambda t: t[f"indices.{NAME}"].fill_(99)),
            f"the indices of '{NAME}' are not valid for",
        ),
        (edited(lambda t: t.update({f"indices.{NAME}": torch.zeros(9, 3)})), "are not valid for"),
        (
            edited(lambda t: t["indices.score.weight"].fill_(99)),
            "indices of 'score.weight' are not valid for",
        ),
    ],
)
def test_damaged(bases, tmp_path, capsys, damage, complaint):
    sparta_adapter(bases[CLASSIFIER], tmp_path / "sparta", CLASSIFIER)
    damage(tmp_path / "sparta")
    with pytest.raises(UserError) as refused:
        convert(tmp_path / "sparta", tmp_path / "ours")
    assert complaint in str(refused.value)
    assert str(tmp_path / "sparta") in str(refused.value)
    assert "must not run" not in capsys.readouterr().out
    assert not (tmp_path / "ours").exists()
