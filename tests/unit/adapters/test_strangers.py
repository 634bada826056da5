"""Adapters that no writer writes are refused with one sentence before a model is changed. `tests/fuzz` draws more of
them.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapter_cases import SPARSE, edit_config, fresh, refusal
from safetensors.torch import load_file, save_file
from stranger_cases import CONFIG, NAME, WEIGHTS, claim, refused_everywhere, reseal, trained_adapter

from launcher.cli import main
from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.save_and_load import load_adapter
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection import checks, draws


def deep(levels: int) -> str:
    return '{"adapter_type": "sparse-zero", "results": ' + "[" * levels + "]" * levels + "}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (deep(100_000), "nested more than 64 levels deep"),
        (deep(500), "nested more than 64 levels deep"),
        ('{"adapter_type": "sparse-zero", "adapter_type": "sparse-zero"}', "the key 'adapter_type' occurs twice"),
        ('{"adapter_type": "sparse-zero", "task": "a\\u0000b"}', "a string has a null character"),
        ('{"adapter_type": "sparse-zero", "\\ud800": 1}', "surrogates not allowed"),
        ('{"adapter_type": "sparse-zero", "seed": ' + "9" * 5000 + "}", "for integer string conversion"),
    ],
    ids=["deep", "less-deep", "twice", "null", "surrogate", "digits"],
)
def test_json_that_no_writer_writes(llama, bases, tmp_path, content, expected):
    (llama / CONFIG).write_text(content)
    message = refused_everywhere(llama, bases["llama"], tmp_path / "out")
    assert f"{CONFIG}: damaged (" in message
    assert expected in message


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"granularity": 0}, "granularity: Input should be greater than or equal to 1"),
        ({"granularity": -1}, "granularity: Input should be greater than or equal to 1"),
        ({"granularity": 3}, "not a selection of a weight of shape [8, 16]: granularity 3"),
        ({"rule": "bernoulli-v1", "probability": float("nan")}, "probability: Input should be"),
        ({"rule": "bernoulli-v1", "probability": float("inf")}, "probability: Input should be"),
        ({"rule": "bernoulli-v1", "probability": 0}, "probability: Input should be greater than 0"),
        ({"rule": "bernoulli-v1"}, "the rule bernoulli-v1 with the probability None"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"seed": True}, "seed: Input should be a valid integer"),
        ({"seed": 1.0}, "seed: Input should be a valid integer"),
        ({"shape": [8.0, 16]}, "shape.0: Input should be a valid integer"),
        ({"shape": [8, -16]}, "shape.1: Input should be greater than or equal to 1"),
        ({"shape": [2**40, 2**40]}, "a weight has 0 to 2**62 scalars"),
        ({"shape": "8x16"}, "shape: Input should be a valid list"),
        ({"whole_rows": [1, 0]}, "its whole rows are not sorted rows of a matrix"),
        ({"whole_rows": [8]}, "its whole rows are not sorted rows of a matrix"),
        ({"rule": "columns-v9"}, "was written by a newer version: then update sparse-zero"),
        ({"share": 0.5}, "was written by a newer version: then update sparse-zero"),
    ],
)
def test_selections_that_no_rule_draws(llama, bases, tmp_path, entries, expected):
    claim(llama, **entries)
    assert expected in refused_everywhere(llama, bases["llama"], tmp_path / "out")


@pytest.mark.parametrize("change", [{"count": -1}, {"count": 1}])
def test_a_probability_that_draws_another_number_of_positions(adapters, bases, tmp_path, change):
    """The checksum is that of what is drawn, as whoever writes the file can compute it."""
    adapter = Path(shutil.copytree(adapters["bernoulli"], tmp_path / "adapter"))
    entry = read_adapter(adapter).config.tensors[NAME]
    drawn = torch.cat([*draws.bernoulli_chunks(11, NAME, 128, entry.probability)])
    assert len(drawn) == entry.count
    tensors = load_file(adapter / WEIGHTS)
    tensors[NAME] = torch.ones(entry.count + change["count"])
    save_file(tensors, adapter / WEIGHTS)
    reseal(adapter)
    claim(adapter, count=entry.count + change["count"])
    assert f"{NAME}: its probability {entry.probability} selects " in refused_everywhere(
        adapter, bases["llama"], tmp_path / "out"
    )


@pytest.mark.parametrize("dtype", ["nn", "float33", "load", "int8", "complex64", "", None, 32])
def test_names_that_are_no_dtypes(llama, bases, tmp_path, dtype):
    edit_config(llama, lambda config: config.update(dtype=dtype))
    assert f"{CONFIG}: dtype: Input should be" in refused_everywhere(llama, bases["llama"], tmp_path / "out")


@pytest.mark.parametrize("version", [-1, 0, True, False, 1.0, "1", None, [1]])
def test_versions_that_no_writer_writes(llama, bases, tmp_path, version):
    edit_config(llama, lambda config: config.update(format_version=version))
    assert f"{CONFIG}: format_version: Input should be" in refused_everywhere(llama, bases["llama"], tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda flat: flat.view(1, -1),
        lambda flat: flat.view(-1, 1),
        lambda flat: flat.float(),
        lambda flat: flat - flat[0] - 1,
        lambda flat: flat.flip(0),
        lambda flat: flat[:-1],
        lambda flat: flat.bool(),
        lambda flat: flat.to(torch.complex64),
        lambda flat: flat + 128,
    ],
    ids=["row", "column", "floats", "negative", "descending", "fewer", "booleans", "complex", "beyond"],
)
def test_stored_positions_that_are_not_positions(adapters, bases, tmp_path, change):
    adapter, name = Path(shutil.copytree(adapters["magnitude"], tmp_path / "adapter")), "adapter_positions.safetensors"
    positions = load_file(adapter / name)
    positions[NAME] = change(positions[NAME]).contiguous()
    save_file(positions, adapter / name)
    reseal(adapter, name)
    if not positions[NAME].is_complex():
        claim(adapter, positions=checks.checksum(positions[NAME].to(torch.int64)))
    message = refused_everywhere(adapter, bases["llama"], tmp_path / "out")
    assert f"{name}: damaged: the positions of '{NAME}' are not valid for its shape [8, 16]" in message


KINDS = {
    "fifo": os.mkfifo,
    "directory": os.mkdir,
    "device": lambda path: os.symlink("/dev/zero", path),
    "loop": lambda path: os.symlink(path, path),
    "dangling": lambda path: os.symlink(f"{path}-gone", path),
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "adapter_positions.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_file_is_not_opened(adapters, bases, tmp_path, name, kind):
    adapter = Path(shutil.copytree(adapters["magnitude"], tmp_path / "adapter"))
    (adapter / name).unlink()
    KINDS[kind](adapter / name)
    assert str(adapter) in refused_everywhere(adapter, bases["llama"], tmp_path / "out")


def test_a_link_to_a_file_is_followed(adapters, bases, tmp_path):
    """As in the cache of the hub."""
    (tmp_path / "snapshot").mkdir()
    for path in adapters["magnitude"].iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    load_adapter(fresh(bases["llama"]), tmp_path / "snapshot")


def test_a_header_without_metadata_is_read(llama, bases):
    content = (llama / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    text = json.dumps(header).encode()
    (llama / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    reseal(llama)
    load_adapter(fresh(bases["llama"]), llama)


def test_a_name_with_escape_characters_is_shown_escaped(llama, capsys):
    edit_config(llama, lambda config: config.update(base_model_name_or_path="\x1b[31mred\x07", revision="a\nb\u202ec"))
    assert main(["inspect", str(llama)]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[31mred\x07" in out
    edit_config(llama, lambda config: config.update({"\x1b]0;title\x07": 1}))
    assert main(["inspect", str(llama)]) == 2
    err = capsys.readouterr().err
    assert r"\x1b]0;title\x07: Extra inputs are not permitted" in err
    assert err.count("\n") == 1
    assert all(character.isprintable() or character == "\n" for character in out + err)


def test_a_message_is_not_as_long_as_a_name(llama, capsys):
    edit_config(llama, lambda config: config.update({"x" * 10**6: 1}))
    assert main(["inspect", str(llama)]) == 2
    assert len(capsys.readouterr().err) < 2500


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
def test_deltas_that_are_not_numbers_of_a_training(llama, bases, tmp_path, dtype):
    tensors = load_file(llama / WEIGHTS)
    tensors[NAME] = tensors[NAME].to(dtype)
    save_file(tensors, llama / WEIGHTS)
    reseal(llama)
    message = refused_everywhere(llama, bases["llama"], tmp_path / "out")
    assert f"{WEIGHTS}: the values of '{NAME}' are {dtype}; they can be float32, float16, bfloat16, float64" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(llama, bases, tmp_path, value):
    tensors = load_file(llama / WEIGHTS)
    tensors[NAME][1] = value
    save_file(tensors, llama / WEIGHTS)
    reseal(llama)
    message = refused_everywhere(llama, bases["llama"], tmp_path / "out", but=("inspect",))
    assert f"has values that are NaN or infinite: {NAME} (1 value)" in message
    facts = describe(llama)
    assert facts["notes"] == [f"NaN or infinite: {NAME} (1 value)"]
    json.dumps(facts, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_values_of_modules_that_are_trained_in_full(bases, tmp_path, dtype):
    adapter = trained_adapter(bases["llama"], tmp_path / "adapter", modules_to_save=["norm"])
    tensors = load_file(adapter / WEIGHTS)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, adapter / WEIGHTS)
    reseal(adapter)
    assert "'model.norm.weight'" in refusal(fresh(bases["llama"]), adapter)


def test_a_refused_adapter_leaves_a_sparse_model(llama, bases):
    model = sparsify(fresh(bases["llama"]), SPARSE)
    claim(llama, shape=[16, 8])
    assert "has shape [8, 16] in the model and [16, 8] in the adapter" in refusal(model, llama)
