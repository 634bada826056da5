import json
import shutil

import pytest
import torch
from format_cases import CAUSAL, CLASSIFIER, open_base, peft_adapter, save_base, sparta_adapter

from launcher.cli import main
from sparse_zero import SparseConfig, UserError, merge_and_unload, save_adapter, sparsify
from sparse_zero.adapters.files import adapter_bytes, read_adapter
from sparse_zero.adapters.formats import format_module
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe, histogram

NAME = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "llama", "llama", CAUSAL)


@pytest.fixture(scope="module")
def own(base, tmp_path_factory):
    """All deltas are 0.02, except -3 at one position and 0 at another."""
    model = sparsify(open_base(base, CAUSAL), SparseConfig(density=0.03, trainable_token_indices=[5]))
    model.sparsity.results = {"accuracy": 0.75}
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.fill_(0.02)
        model.sparsity.weights[NAME].delta[7] = -3
        model.sparsity.weights[NAME].delta[8] = 0
    out = tmp_path_factory.mktemp("own")
    save_adapter(model, out)
    return out


def test_own(base, own):
    facts = describe(own)
    adapter = read_adapter(own)
    assert facts["format"] == "sparse-zero"
    assert facts["base_model"] == str(base)
    assert facts["selection"] == "stratified-v1; density: 0.03; seed 0"
    assert facts["trainable_parameters"] == adapter.config.trainable_parameters
    assert facts["bytes"] == adapter_bytes(own)
    assert facts["bytes_per_scalar"] == facts["bytes"] / facts["trainable_parameters"]
    assert facts["results"] == {"accuracy": 0.75}
    assert facts["library_versions"] == adapter.config.library_versions
    selected = sum(values.numel() for values in adapter.deltas.values())
    assert facts["norm"] == pytest.approx(((selected - 2) * 0.02**2 + 9) ** 0.5)

    tensors = {entry["name"]: entry for entry in facts["tensors"]}
    entry, values = tensors[NAME], adapter.deltas[NAME]
    assert (entry["shape"], entry["trained"], entry["scalars"]) == ([16, 16], "selected", values.numel())
    assert entry["density"] == values.numel() / 256
    assert entry["norm"] == pytest.approx(values.norm().item())
    assert (entry["largest"], entry["zeros"]) == (3.0, 1)
    assert tensors["model.embed_tokens.weight"]["trained"] == "rows"
    assert tensors["model.embed_tokens.weight"]["scalars"] == 16

    layers = {row["name"]: row for row in facts["layers"]}
    assert layers.keys() == {"model.layers.0", "model.layers.1", "model.embed_tokens.weight", "lm_head.weight"}
    assert layers["model.layers.1"]["weights"] == 2
    assert layers["model.layers.1"]["largest"] == 3.0
    kinds = {row["name"]: row for row in facts["kinds"]}
    assert kinds["model.layers.*.self_attn.o_proj.weight"]["weights"] == 2
    assert sum(row["scalars"] for row in facts["kinds"]) == facts["trainable_parameters"]
    assert sum(row["scalars"] for row in facts["layers"]) == facts["trainable_parameters"]

    counts = {bar["from"]: bar["scalars"] for bar in facts["histogram"]}
    assert counts == {0.0: 1, 0.01: selected - 2, 0.1: 0, 1.0: 1}
    position = adapter.positions(NAME)[7].item()
    assert facts["largest"][0] == {"name": NAME, "position": list(divmod(position, 16)), "delta": -3.0}
    assert len(facts["largest"]) == 10
    json.dumps(facts)


@pytest.mark.parametrize("base_is_there", [True, False])
@pytest.mark.parametrize("kind", ["shira", "supertuning", "sparta"])
def test_other_formats(base, tmp_path, kind, base_is_there):
    here = tmp_path / "base"
    shutil.copytree(base, here)
    if kind == "sparta":
        sparta_adapter(here, tmp_path / "theirs", CAUSAL)
    else:
        peft_adapter(here, tmp_path / "theirs", CAUSAL, kind)
    convert(tmp_path / "theirs", tmp_path / "ours")
    expected = describe(tmp_path / "ours")
    if not base_is_there:
        shutil.rmtree(here)
    facts = describe(tmp_path / "theirs")
    assert facts["format"] == format_module(kind).TITLE
    same = ["base_model", "task", "trainable_parameters", "norm", "histogram", "kinds", "layers"]
    # The reference's directory contains the base model's config
    shapes_known = base_is_there or kind == "sparta"
    same += ["tensors", "total_parameters", "density"] if shapes_known else []
    for key in same:
        if key in ("histogram", "kinds", "layers", "tensors"):
            for one, other in zip(facts[key], expected[key], strict=True):
                assert one.pop("shape", None) == other.pop("shape", None)
                assert one == pytest.approx(other), key
        else:
            assert facts[key] == pytest.approx(expected[key]), key
    if shapes_known:
        assert facts["largest"] == expected["largest"]
    else:
        assert [entry["delta"] for entry in facts["largest"]] == [entry["delta"] for entry in expected["largest"]]
    json.dumps(facts)


def test_a_fine_tuned_model(base, own, tmp_path):
    model = sparsify(open_base(base, CAUSAL), SparseConfig(density=0.03))
    with torch.no_grad():
        for weight in model.sparsity.weights.values():
            weight.delta.fill_(0.5)
    count = model.sparsity.selected_parameters
    merge_and_unload(model).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is a model, not an adapter; pass .* with --base"):
        describe(tmp_path)
    facts = describe(tmp_path, str(base))
    assert facts["trainable_parameters"] == count
    assert [bar["scalars"] for bar in facts["histogram"]] == [count]
    assert facts["histogram"][0]["from"] == 0.1
    assert "bytes" not in facts


def test_whole_modules(tmp_path):
    base = save_base(tmp_path / "base", "bert", CLASSIFIER)
    peft_adapter(base, tmp_path / "theirs", CLASSIFIER, "shira")
    tensors = {entry["name"]: entry for entry in describe(tmp_path / "theirs")["tensors"]}
    assert tensors["classifier.weight"]["trained"] == "whole"
    assert tensors["classifier.weight"]["shape"] == [2, 16]


def test_histogram_of_nothing_and_of_the_edges():
    assert histogram([]) == []
    assert histogram([torch.zeros(3)]) == [{"from": 0.0, "to": 0.0, "scalars": 3}]
    bars = histogram([torch.tensor([1e-3, -9.99e-3]), torch.tensor([1.0, 0.0])])
    assert [(bar["from"], bar["scalars"]) for bar in bars] == [(0.0, 1), (1e-3, 2), (1e-2, 0), (0.1, 0), (1, 1)]
    # All tiny values are in one bin
    bars = histogram([torch.tensor([1e-30, -9e-9, 2e-7])])
    assert [(bar["from"], bar["to"], bar["scalars"]) for bar in bars] == [
        (0, 1e-8, 2),
        (1e-8, 1e-7, 0),
        (1e-7, 1e-6, 1),
    ]


# The command


@pytest.mark.parametrize("command", [["inspect"], ["convert", "out"]])
def test_unknown_directories(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some").mkdir()
    assert main([command[0], "some", *command[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparse-zero: error: some: no known adapter or model: expected adapter_config.json")
    assert "sparse_deltas.pt (peft-sparta)" in error
    assert error.count("\n") == 1
    assert main([command[0], "nowhere", *command[1:]]) == 2
    assert "nowhere: no such" in capsys.readouterr().err


def test_out_must_be_new(own, tmp_path, capsys):
    assert main(["convert", str(own), str(tmp_path / "a" / "new"), "--to", "shira"]) == 2
    assert "has fully trained rows" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        assert main(["convert", str(own), str(tmp_path / name), "--to", "shira"]) == 2
        assert f"{name}: already exists" in capsys.readouterr().err
    assert main(["convert", str(own), str(tmp_path / "new")]) == 2
    assert "already has the format sparse-zero" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_what_people_see(base, tmp_path, capsys):
    peft_adapter(base, tmp_path / "theirs", CAUSAL, "shira")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "PEFT SHiRA" in out
    assert "bytes per scalar" in out
    assert main(["inspect", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    for shown in (
        "weights of each kind",
        "model.layers.*.mlp.down_proj.weight",
        "magnitudes",
        "###",
        "largest changes",
    ):
        assert shown in out
