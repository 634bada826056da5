"""Valid adapters of every rule and format, small, and what damages their files."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
import xxhash
from hypothesis import strategies as st
from mutations import file_kinds, mutated_bytes, mutated_json, mutated_safetensors, place
from older_version import DIRECTORY, make, save_bases
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparse_zero.adapters.files import CONFIG_NAME, POSITIONS_NAME, WEIGHTS_NAME
from sparse_zero.adapters.formats.convert import convert
from sparse_zero.adapters.merging import write_merged
from sparse_zero.selection import checks, rules

NATIVE = list(make.ADAPTERS)
FOREIGN = ["shira", "sparta", "sparta-pickled", "sparta-classifier", "supertuning", "paca", "fine-tuned"]
REFUSED = ["lora"]
"""Adapters that no reader reads: they are recognised, and refused."""
DELTAS, CLASSIFIER = "sparse_deltas.safetensors", "LlamaForSequenceClassification"
BASE = "base/llama"
"""The base model of most adapters, relative to the working directory. That of "head" is base/bert."""


def write_seeds(directory: Path) -> None:
    """Write base models to base/, and adapters by the names in NATIVE, FOREIGN and REFUSED. Needs `directory` as the
    working directory."""
    save_bases(directory)
    for name in [*NATIVE, "shira", "sparta"]:
        shutil.copytree(DIRECTORY / "adapters" / name, directory / name)
    convert("strips", "supertuning", "supertuning")
    write_merged("stratified", "fine-tuned")
    tensors = load_file(f"sparta/{DELTAS}")
    _write_pickled(tensors)
    _write_classifier(tensors)
    _write_paca()
    lora = peft.LoraConfig(target_modules=["v_proj"], r=2, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), lora).save_pretrained("lora")


def _write_paca() -> None:
    """As PEFT 0.22 saves it: whole columns of some weights."""
    model, tensors = AutoModelForCausalLM.from_pretrained(BASE), {}
    for name, module in model.named_modules():
        if name.endswith("v_proj"):
            tensors[f"base_model.model.{name}.paca_delta"] = torch.ones(module.out_features, 2)
            tensors[f"base_model.model.{name}.paca_indices"] = torch.tensor([1, 4])
    config = {"peft_type": "PACA", "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE, "peft_version": "0.22.0"}
    config |= {"r": 2, "paca_alpha": 4, "random_seed": None, "target_modules": ["v_proj"], "modules_to_save": None}
    Path("paca").mkdir()
    Path("paca", CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, f"paca/{WEIGHTS_NAME}")


def _write_pickled(tensors: dict[str, torch.Tensor]) -> None:
    shutil.copytree("sparta", "sparta-pickled")
    parts = {
        kind: {name.partition(".")[2]: tensor.clone() for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("indices", "deltas")
    }
    torch.save(parts, "sparta-pickled/sparse_deltas.pt")
    Path("sparta-pickled", DELTAS).unlink()


def _write_classifier(tensors: dict[str, torch.Tensor]) -> None:
    shutil.copytree("sparta", "sparta-classifier")
    path = Path("sparta-classifier/config.json")
    labels = {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | labels | {"architectures": [CLASSIFIER]}))
    head = {"indices.score.weight": torch.tensor([[0, 3]], dtype=torch.int32), "deltas.score.weight": torch.ones(1)}
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n} | head, f"sparta-classifier/{DELTAS}")
    save_file({"head": torch.zeros(2, 16)}, "sparta-classifier/head_init.safetensors")


@st.composite
def damaged(draw, names: list[str], out: Path) -> tuple[str, list[str]]:
    """Write a damaged copy of one of these seeds to `out`.

    Returns: the seed's name, and what was damaged.
    """
    name = draw(st.sampled_from(names))
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(name, out)
    files = sorted(path for path in out.iterdir() if path.suffix in (".json", ".safetensors", ".pt"))
    # The files with the claims more often than a tokenizer's
    chosen = [draw(st.sampled_from(files)) for _ in range(draw(st.sampled_from([1, 1, 2])))]
    for path in dict.fromkeys(chosen):
        content = path.read_bytes()
        if draw(st.integers(0, 19)) == 0:
            place(path, draw(file_kinds))
        elif path.suffix == ".json":
            path.write_bytes(draw(mutated_json(json.loads(content))))
        elif path.suffix == ".safetensors":
            path.write_bytes(draw(mutated_safetensors(content)))
        else:
            path.write_bytes(draw(mutated_bytes(content)))
    if name in NATIVE and draw(st.integers(0, 4)) > 0:
        reseal(Path(name), out)
    return name, [path.name for path in chosen]


def reseal(seed: Path, damaged: Path) -> None:
    """Put the checksums of the damaged files in place of the seed's, as whoever damages them can do."""
    path = damaged / CONFIG_NAME
    if not path.is_file() or path.stat().st_size > 2**24:
        return
    content, config = path.read_bytes(), json.loads((seed / CONFIG_NAME).read_bytes())
    for name, checksum in config["files"].items():
        file = damaged / name
        if file.is_file() and file.stat().st_size < 2**24:
            content = content.replace(checksum.encode(), xxhash.xxh3_128_hexdigest(file.read_bytes()).encode())
    for old, new in _checksums_of_positions(damaged, content, config["tensors"]):
        content = content.replace(old.encode("utf-8", "surrogatepass"), new.encode())
    path.write_bytes(content)


def _checksums_of_positions(damaged: Path, content: bytes, seed: dict[str, dict]) -> Iterator[tuple[str, str]]:
    """The checksums of the seed, and those of what the damaged files contain or claim."""
    with contextlib.suppress(Exception):
        path = damaged / POSITIONS_NAME
        for name, flat in load_file(path).items() if path.is_file() else ():
            yield seed[name]["positions"], checks.checksum(flat.to(torch.int64))
    with contextlib.suppress(Exception):
        for name, entry in json.loads(content)["tensors"].items():
            if entry["rule"] != rules.STORED and math.prod(entry["shape"]) < 10**6:
                shape, rows = tuple(entry.pop("shape")), tuple(entry.pop("whole_rows"))
                old = entry.pop("positions")
                drawn = [*rules.Selection(name=name, shape=shape, whole_rows=rows, **entry).chunks()]
                yield str(old), checks.checksum(torch.cat(drawn))
