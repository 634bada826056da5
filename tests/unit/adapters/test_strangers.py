"""Adapters from anybody: no code of theirs runs, their claims are checked before any work, and what is wrong is
refused with one sentence before a model is changed. `tests/fuzz` draws more of them.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import xxhash
from adapter_cases import SPARSE, edit_config, fresh, refusal, train
from safetensors.torch import load_file, save_file
from transformers import dynamic_module_utils

from launcher.cli import main
from sparse_zero.adapters.combine import combine_adapters
from sparse_zero.adapters.files import read_adapter
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.inspection import describe
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.data.models import load_config, load_model, load_tokenizer
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection import checks, rules
from sparse_zero.selection.config import SparseConfig

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "model.layers.0.self_attn.v_proj.weight"
AT_ONCE = 5.0
"""Seconds."""


def trained_adapter(base: Path, out: Path, **settings: object) -> Path:
    model = sparsify(fresh(base), SparseConfig(**{"density": 0.04, "seed": 11} | settings))
    train(model)
    save_adapter(model, out)
    return out


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory) -> dict[str, Path]:
    """An adapter of Llama by each rule."""
    out = tmp_path_factory.mktemp("adapters")
    kinds = ("stratified", "bernoulli", "magnitude")
    return {kind: trained_adapter(bases["llama"], out / kind, selection=kind) for kind in kinds}


@pytest.fixture
def llama(adapters, tmp_path) -> Path:
    return Path(shutil.copytree(adapters["stratified"], tmp_path / "adapter"))


def reseal(adapter: Path, name: str = WEIGHTS) -> None:
    """The checksum of a changed file, as whoever changes it can write it."""
    checksum = xxhash.xxh3_128_hexdigest((adapter / name).read_bytes())
    edit_config(adapter, lambda config: config["files"].update({name: checksum}))


def set_in(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refused_everywhere(adapter: Path, base: Path, out: Path, but: tuple[str, ...] = ()) -> str:
    """The message of every command, which must be the same kind of error at once. Args: but: what may succeed."""
    calls = {
        "inspect": lambda: describe(adapter),
        "convert": lambda: convert(adapter, out, "sparta"),
        "merge": lambda: write_merged(adapter, out),
        "combine": lambda: combine_adapters([adapter, adapter], out),
        "load": lambda: load_adapter(fresh(base), adapter),
    }
    messages = []
    for name, call in calls.items():
        started = time.monotonic()
        if name in but:
            call()
            shutil.rmtree(out, ignore_errors=True)
        else:
            with pytest.raises(UserError) as error:
                call()
            messages.append(str(error.value))
            assert not out.exists(), name
        assert time.monotonic() - started < AT_ONCE, name
    return messages[-1]


# 1. No code of a file runs


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def own_code(bases, tmp_path, monkeypatch):
    """A base model with Python code of its own, and the file that exists once the code has run."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    # transformers asks on the terminal whether to run the code unless it is told
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    base, marker = Path(shutil.copytree(bases["llama"], tmp_path / "own")), tmp_path / "ran"
    (base / "own_code.py").write_text(CODE.format(marker=str(marker)))
    auto = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"}
    set_in(base / "config.json", model_type="own", auto_map=auto, architectures=["OwnModel"])
    return base, marker


SETTINGS = {
    "trust_remote_code": True,
    "attn_implementation": "organisation/kernel",
    "_attn_implementation": "organisation/kernel",
    "experts_implementation": "organisation/kernel",
    "code_revision": "main",
    "quantization_config": {"load_in_4bit": True},
    "auto_map": {"AutoModelForCausalLM": "own_code.OwnModel"},
    "use_kernels": True,
    "cache_dir": "/tmp",
    "state_dict": {},
    "device_map": "auto",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_only_the_entries_of_a_task_are_model_settings(llama, own_code, tmp_path, setting):
    base, marker = own_code
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    edit_config(llama, lambda config: config["model_settings"].update({setting: SETTINGS[setting]}))
    with pytest.raises(UserError, match=f"{CONFIG}: model_settings.{setting}: "):
        write_merged(llama, tmp_path / "out", trust_remote_code=True)
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("id2label", ["a", "b"]),
        ("id2label", {"0": 1}),
        ("id2label", {"zero": "a"}),
        ("id2label", {"00": "a"}),
        ("id2label", {"-1": "a"}),
        ("label2id", {"a": "0"}),
        ("label2id", {"a": True}),
        ("problem_type", "org/kernel"),
        ("pad_token_id", 1.0),
        ("pad_token_id", True),
        ("pad_token_id", [0]),
        ("pad_token_id", 10**30),
    ],
)
def test_model_settings_have_their_types(llama, bases, tmp_path, entry, value):
    edit_config(llama, lambda config: config["model_settings"].update({entry: value}))
    assert f"model_settings.{entry}" in refused_everywhere(llama, bases["llama"], tmp_path / "out")


def test_code_of_the_base_model_runs_only_if_the_caller_says_so(llama, own_code, bases, tmp_path, capsys):
    base, marker = own_code
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    expected = r"has Python code of its own, which is not run; .* --trust-remote-code"
    for call in (
        lambda: write_merged(llama, tmp_path / "out"),
        lambda: convert(llama, tmp_path / "out", "sparta"),
        lambda: convert(base, tmp_path / "out", base=str(bases["llama"])),
        lambda: describe(base, str(bases["llama"])),
        lambda: load_model(str(base), "causal-lm"),
        lambda: load_config(str(base)),
    ):
        with pytest.raises(UserError, match=expected):
            call()
    assert main(["merge", str(llama), str(tmp_path / "out")]) == 2
    assert not marker.exists()
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main(["merge", str(llama), str(tmp_path / "out"), "--trust-remote-code"]) == 0
    assert marker.exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_code_of_a_tokenizer_is_not_run(llama, own_code, tmp_path):
    base, marker = own_code
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(base / "own_code.py", tokenizer)
    auto = {"AutoTokenizer": [None, "own_code.OwnTokenizer"]}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": auto}))
    with pytest.raises(UserError, match="has Python code of its own"):
        load_tokenizer(str(tokenizer))
    edit_config(llama, lambda config: config.update(tokenizer=str(tokenizer)))
    with pytest.raises(UserError, match="has Python code of its own"):
        write_merged(llama, tmp_path / "out")
    assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_a_base_model_names_is_not_loaded(bases, llama, tmp_path, monkeypatch, key):
    loaded = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: loaded.append(a))
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    set_in(base / "config.json", **{key: "organisation/kernel"})
    with pytest.raises(UserError, match=r"asks for the kernel 'organisation/kernel', which .* would download and run"):
        load_model(str(base), "causal-lm")
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    for call in (write_merged, lambda *paths: convert(*paths, "sparta")):
        with pytest.raises(UserError, match="organisation/kernel"):
            call(llama, tmp_path / "out")
    assert loaded == []


def test_a_peft_adapter_in_the_base_model_is_not_loaded(bases, llama, tmp_path):
    """PEFT imports the module that `megatron_core` names."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    config = {"peft_type": "LORA", "target_modules": ["v_proj"], "megatron_core": "antigravity", "megatron_config": {}}
    (base / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    with pytest.raises(UserError, match=r"its base model .*base has an adapter of its own \(.*adapter_config.json\)"):
        write_merged(llama, tmp_path / "out")


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "added_tokens.json", "other"])
def test_a_pipe_in_a_base_model_is_not_opened(bases, llama, tmp_path, name):
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    (base / name).unlink(missing_ok=True)
    os.mkfifo(base / name)
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    for call in (lambda: write_merged(llama, tmp_path / "out"), lambda: load_tokenizer(str(base))):
        with pytest.raises(UserError, match=f"{name}: is not a file but a pipe or device"):
            call()


def test_a_pickle_in_an_adapter_is_not_opened(llama, bases, tmp_path):
    torch.save({"x": torch.ones(1)}, llama / WEIGHTS)
    reseal(llama)
    assert "damaged" in refused_everywhere(llama, bases["llama"], tmp_path / "out")


# 3. Claims


def claim(adapter: Path, **entries: object) -> None:
    edit_config(adapter, lambda config: config["tensors"][NAME].update(entries))


HUGE = [10**7, 10**7]


def test_a_small_file_that_claims_a_huge_weight(adapters, bases, tmp_path):
    adapter = Path(shutil.copytree(adapters["bernoulli"], tmp_path / "adapter"))
    # As plausible as it can be: about as many positions as the file has values
    claim(adapter, shape=HUGE, probability=read_adapter(adapter).config.tensors[NAME].count / 10**14)
    message = refused_everywhere(adapter, bases["llama"], tmp_path / "out", but=("inspect",))
    assert "has shape [8, 16] in the model and [10000000, 10000000] in the adapter" in message
    facts = describe(adapter)
    assert "claims weights of 100,000,000,000" in facts["notes"][0]
    assert {change["position"] for change in facts["largest"]} == {None}


@pytest.mark.parametrize("kind", ["stratified", "magnitude"])
def test_positions_of_a_huge_weight_take_no_more_time_than_there_are_values(adapters, bases, tmp_path, kind):
    adapter = Path(shutil.copytree(adapters[kind], tmp_path / "adapter"))
    claim(adapter, shape=HUGE)
    if kind == "stratified":
        count = read_adapter(adapter).config.tensors[NAME].count
        claim(adapter, positions=checks.checksum(rules.stratified_positions(11, NAME, 10**14, count)))
    message = refused_everywhere(adapter, bases["llama"], tmp_path / "out", but=("inspect", "combine"))
    assert "has shape [8, 16] in the model" in message


@pytest.mark.parametrize("count", [10**7, 10**12, 2**63, 10**400])
def test_a_count_that_the_file_does_not_hold(llama, bases, tmp_path, count):
    claim(llama, shape=HUGE, count=count)
    refused_everywhere(llama, bases["llama"], tmp_path / "out")


def test_whole_rows_that_the_file_does_not_hold(llama, bases, tmp_path):
    claim(llama, shape=HUGE, whole_rows=[3, 10**7 - 1], count=2 * 10**7)
    refused_everywhere(llama, bases["llama"], tmp_path / "out")


@pytest.mark.parametrize(
    "claims",
    [
        {"num_hidden_layers": 10**7},
        {"num_hidden_layers": 10**30},
        {"hidden_size": 10**7},
        {"vocab_size": 10**9, "hidden_size": 10**6},
        {"vocab_size": 10**15, "hidden_size": 10**15},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "2"},
        {"num_attention_heads": 0},
    ],
)
def test_a_base_model_that_claims_more_than_its_files_hold(adapters, bases, tmp_path, claims):
    """In the base model, and in the copy of its config that peft-sparta's adapters have."""
    base = Path(shutil.copytree(bases["llama"], tmp_path / "base"))
    llama = Path(shutil.copytree(adapters["stratified"], tmp_path / "adapter"))
    edit_config(llama, lambda config: config.update(base_model_name_or_path=str(base)))
    convert(llama, tmp_path / "sparta", "sparta")
    for config in (base / "config.json", tmp_path / "sparta" / "config.json"):
        set_in(config, **claims)
    for call in (
        lambda: write_merged(llama, tmp_path / "out"),
        lambda: convert(llama, tmp_path / "out", "shira"),
        lambda: convert(tmp_path / "sparta", tmp_path / "out"),
        lambda: convert(base, tmp_path / "out", base=str(bases["llama"])),
    ):
        started = time.monotonic()
        with pytest.raises(UserError):
            call()
        assert time.monotonic() - started < AT_ONCE
    assert not (tmp_path / "out").exists()


def test_pickled_tensors_that_claim_more_than_their_file_holds(adapters, tmp_path):
    convert(adapters["stratified"], tmp_path / "sparta", "sparta")
    (tmp_path / "sparta" / "sparse_deltas.safetensors").unlink()
    path = tmp_path / "sparta" / "sparse_deltas.pt"
    huge = torch.zeros(1).expand(10**7, 10**7)
    torch.save({"indices": {NAME: huge}, "deltas": {NAME: huge}}, path)
    assert path.stat().st_size < 20_000
    for call in (lambda: describe(tmp_path / "sparta"), lambda: convert(tmp_path / "sparta", tmp_path / "out")):
        with pytest.raises(UserError, match=r"sparse_deltas.pt: damaged \(a tensor of shape \[10000000, 10000000\]"):
            call()


# 4. What no writer writes


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
    drawn = torch.cat([*rules.bernoulli_chunks(11, NAME, 128, entry.probability)])
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


# 5. Values


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
