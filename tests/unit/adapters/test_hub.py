"""Adapters and base models on the hub: a stand-in of its HTTP interface serves them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from adapter_cases import fresh, logits, trained
from families import tiny
from hub_server import Hub, hub
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_zero.adapters.files import read_config
from sparse_zero.adapters.hub import adapter_directory, is_hub_id
from sparse_zero.adapters.merging import write_merged
from sparse_zero.adapters.save_and_load import load_adapter, save_adapter
from sparse_zero.errors import UserError
from sparse_zero.model.sparsify import sparsify
from sparse_zero.selection.config import SparseConfig

BASE_CARD = "---\nlicense: other\nlicense_name: strange\nlicense_link: https://example.org/licence\n---\n# Base\n"


@pytest.fixture
def server():
    with hub() as running:
        yield running


@pytest.fixture
def adapters(server: Hub, tokenizer_dir, tmp_path):
    return add_adapters(server, tokenizer_dir, tmp_path)


def add_adapters(server: Hub, tokenizer_dir, directory):
    """The base model org/base, and two revisions of user/adapter on the stand-in. Returns: the models by revision."""
    base = directory / "llama-with-licence"
    shutil.copytree(tokenizer_dir, base)
    tiny("llama", vocab_size=2000).save_pretrained(base)
    (base / "LICENSE").write_text("you may")
    (base / "preprocessor_config.json").write_text("{}")
    (base / "README.md").write_text(BASE_CARD)
    server.add("org/base", base)
    models = {}
    for revision, seed in (("v1", 3), ("main", 4)):
        models[revision] = sparsify(fresh(base), SparseConfig(density=0.01))
        with torch.no_grad():
            for weight in models[revision].sparsity.weights.values():
                weight.delta.normal_(0, seed)
        models[revision].sparsity.base_model = "org/base"
        save_adapter(models[revision], directory / revision)
        (directory / revision / "optimizer.bin").write_text("large")
        if revision == "v1":
            (directory / revision / "README.md").write_text("a card that its owner has edited")
        server.add("user/adapter", directory / revision, revision)
    return models


def run(server: Hub, directory, code: str, *words: str, status: int = 0) -> tuple[str, str]:
    """Run Python code in a process that takes the stand-in for the hub. Returns: stdout and stderr."""
    environment = os.environ | server.environment(directory / "cache")
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=directory, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


COMMANDS = """
import json, sys, torch
from launcher.cli import main
for words in json.loads(sys.argv[1]):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    for stream in (sys.stdout, sys.stderr):
        print(f"\\nENDED {status}", file=stream, flush=True)

from transformers import AutoModelForCausalLM
from sparse_zero import load_adapter
model = AutoModelForCausalLM.from_pretrained("org/base")
for number, revision in enumerate((None, "v1")):
    load_adapter(model, "user/adapter", f"adapter-{number}" if number == 0 else None, revision=revision)
    ids = torch.arange(3, 31).view(4, 7) % 96
    torch.save(model.eval()(ids).logits.detach(), f"{number}.pt")
"""
CHAT = ["--prompt", "a", "--max-new-tokens", "2", "--json"]
EVALUATE = ["evaluate", "r.yaml", "--adapter", "user/adapter", "--json", "--revision"]
GOOD = {
    "merge": ["merge", "user/adapter", "merged", "--revision", "v1"],
    "inspect": ["inspect", "user/adapter", "--revision", "v1", "--json"],
    "compare": ["chat", "user/adapter", *CHAT, "--compare"],
    "convert": ["convert", "user/adapter", "converted", "--to", "supertuning", "--revision", "v1"],
    "base": ["chat", "org/base", *CHAT],
    "v1": [*EVALUATE, "v1"],
    "main": [*EVALUATE, "main"],
}
"""Commands that take an id."""
ABSENT = {
    ("merge", "user/none", "out"): "user/none: no such adapter directory, and it cannot be downloaded from the hub",
    ("inspect", "user/adapter", "--revision", "v9"): "cannot be downloaded from the hub",
    ("merge", "org/base", "out"): "not an adapter directory (it has no adapter_config.json)",
    ("chat", "user/none", "--prompt", "a"): "user/none cannot be loaded",
}
TEXT = "a b c d e f g h"


@dataclass
class Done:
    """What one process has done with the hub: it imports torch once for all commands, and loads adapters itself."""

    here: Path
    models: dict
    requests: list
    good: dict[str, str]
    """What each command printed."""
    absent: list[str]
    """What each command of ABSENT printed on stderr."""


@pytest.fixture(scope="module")
def done(tokenizer_dir, tmp_path_factory) -> Iterator[Done]:
    here = tmp_path_factory.mktemp("hub")
    (here / "d.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    recipe = {"model": {"name": "org/base", "task": "causal-lm"}, "training": {"output_dir": "run", "use_cpu": True}}
    recipe["data"] = {"path": "d.jsonl", "columns": {"text": "text"}, "eval_split": "train", "max_length": 64}
    (here / "r.yaml").write_text(yaml.safe_dump(recipe))
    with hub() as server:
        models = add_adapters(server, tokenizer_dir, here)
        commands = [*GOOD.values(), *map(list, ABSENT)]
        printed = [re.split(r"\nENDED (\d+)\n", text) for text in run(server, here, COMMANDS, json.dumps(commands))]
        out, err = (texts[:-1:2] for texts in printed)
        statuses = [int(status) for status in printed[0][1::2]]
        assert statuses == [0] * len(GOOD) + [2] * len(ABSENT), printed
        yield Done(here, models, server.requests, dict(zip(GOOD, out, strict=False)), err[len(GOOD) :])


def test_adapters_are_loaded_by_their_id_and_revision(done):
    for number, revision in enumerate(("main", "v1")):
        assert torch.allclose(torch.load(done.here / f"{number}.pt"), logits(done.models[revision]), atol=1e-5)
    assert not [request for request in done.requests if "optimizer.bin" in request and "resolve" in request]


def test_merge_writes_what_belongs_to_the_model(done):
    directory = done.here / "merged"
    merged = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.allclose(logits(merged), logits(done.models["v1"]), atol=1e-6)
    assert (directory / "LICENSE").read_text() == "you may"
    assert (directory / "preprocessor_config.json").is_file()
    assert (directory / "generation_config.json").is_file()
    card = (directory / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "license": "other",
        "license_link": "https://example.org/licence",
        "license_name": "strange",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-zero", "sparta"],
    }


def test_other_commands_take_an_id(done):
    assert json.loads(done.good["inspect"])["base_model"] == "org/base"
    assert set(json.loads(done.good["compare"])) == {"model", "prompt", "answer", "base_answer", "seconds"}
    assert json.loads(done.good["base"])["model"] == "org/base"
    model = PeftModel.from_pretrained(fresh(done.here / "llama-with-licence"), done.here / "converted")
    assert torch.allclose(logits(model), logits(done.models["v1"]), atol=1e-5)


def test_an_adapter_is_evaluated_by_its_id(done):
    """By its revision, on a base model that is an id too; the loss is that of the model in this process."""
    tokenizer = AutoTokenizer.from_pretrained(done.here / "llama-with-licence")
    ids = torch.tensor([[*tokenizer(TEXT).input_ids, tokenizer.eos_token_id]])
    for revision in ("v1", "main"):
        with torch.no_grad():
            expected = done.models[revision](input_ids=ids, labels=ids).loss
        assert json.loads(done.good[revision])["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_what_the_hub_does_not_have(done):
    for expected, err in zip(ABSENT.values(), done.absent, strict=True):
        assert expected in err
        assert err.strip().splitlines()[-1].startswith("sparse-zero: error: ")


PUSH = """
import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoModelForCausalLM, TrainingArguments
from sparse_zero import SparseTrainer, load_adapter, save_adapter
model = load_adapter(AutoModelForCausalLM.from_pretrained("org/base"), "user/adapter")
save_adapter(model, "pushed", push_to_hub="user/pushed")
model.save_pretrained("other", push_to_hub=True, repo_id="user/other")

def edit(repository, old, new):
    with open(hf_hub_download(repository, "README.md")) as file:
        card = file.read()
    assert old in card
    HfApi().upload_file(
        path_or_fileobj=card.replace(old, new).encode(), path_in_repo="README.md", repo_id=repository
    )

model.push_to_hub("user/mixin", tags=["mine"], private=True, max_shard_size="1GB")
edit("user/mixin", "<!-- sparse-zero: rew", "# My adapter\\r\\n\\n<!-- sparse-zero: rew")
edit("user/mixin", "sparse-zero: end -->", "sparse-zero: end -->\\nWritten by me.")
edit("user/mixin", "tags:", "license: mit\\nlanguage: en\\ntags:\\n- french")
model.sparsity.results = {"accuracy": 0.625}
model.push_to_hub("user/mixin")
arguments = TrainingArguments("run", hub_model_id="user/mixin", use_cpu=True, report_to=[], hub_token="hf_test")
model.sparsity.results = {"accuracy": 0.75}
SparseTrainer(model, arguments).push_to_hub()

edit("user/pushed", "## Use", "## How I use it")
save_adapter(model, "pushed", push_to_hub="user/pushed")
save_adapter(model, "again", push_to_hub="forbidden/pushed")
"""


@pytest.fixture
def pushed(server, adapters, tmp_path) -> str:
    """Adapters on the hub, some of whose cards were edited there. Returns: stderr."""
    broken = b"---\nlicense: [broken\n---\nmine"
    server.add("user/other", {"adapter_positions.safetensors": b"old", "notes.txt": b"mine", "README.md": broken})
    return run(server, tmp_path, PUSH, status=1)[1]


def test_an_adapter_is_pushed_with_its_card(pushed, server, adapters, tmp_path):
    """What a person wrote into the card on the hub outlives a push, by each way of pushing."""
    assert "sparse_zero.errors.UserError: push_to_hub: forbidden/pushed: cannot be written (" in pushed
    cards = {}
    for name, others in (("pushed", {}), ("other", {"notes.txt": b"mine"})):
        files = server.commits[server.branches[f"user/{name}", "main"]]
        written = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        assert files == written | others
        assert read_config(tmp_path / name).base_model_name_or_path == "org/base"
    for name in ("pushed", "other", "mixin"):
        card = server.commits[server.branches[f"user/{name}", "main"]]["README.md"].decode()
        cards[name] = (yaml.safe_load(card.split("---")[1]), card)
        assert (cards[name][0]["base_model"], cards[name][0]["base_model_relation"]) == ("org/base", "adapter")

    # The metadata could not be read, and there was no text of ours
    assert cards["other"][1].endswith("---\nmine")
    # Edited within our text: it stays, with its old figures, and a warning says so
    assert "## How I use it" in cards["pushed"][1]
    assert "| accuracy |" not in cards["pushed"][1]
    assert cards["pushed"][0]["metrics"] == ["accuracy"]
    assert pushed.count("the text of the model card was edited") == 2  # and that of user/other
    # Edited around it: the new figures are there, by the mixin and by the Trainer
    metadata, card = cards["mixin"]
    assert {"license": "mit", "language": "en"}.items() <= metadata.items()
    assert metadata["tags"] == ["french", "sparse-zero", "sparta", "adapter", "mine"]
    assert card.index("# My adapter\n") < card.index("# Sparse adapter of") < card.index("Written by me.")
    assert "| accuracy |  | 0.75 |" in card
    assert card.count("## Use") == 1


def test_a_local_directory_wins(server, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree("v1", "user/adapter")
    assert not is_hub_id("user/adapter")
    model = load_adapter(fresh(tmp_path / "llama-with-licence"), "user/adapter")
    assert torch.equal(logits(model), logits(adapters["v1"]))
    assert not server.requests


@pytest.mark.parametrize("name", ["one", "./a/b", "../a", "a/b/c", "/a/b", "a/b c", "~/a", "a/.."])
def test_names_that_are_no_ids(name):
    assert not is_hub_id(name)
    with pytest.raises(UserError, match=r"no such adapter directory$"):
        adapter_directory(name)


def test_a_merged_model_of_a_directory_has_its_licence(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    (base / "LICENSE.txt").write_text("you may")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    model = trained(base)
    save_adapter(model, tmp_path / "adapter")
    write_merged(tmp_path / "adapter", tmp_path / "merged")
    assert (tmp_path / "merged" / "LICENSE.txt").read_text() == "you may"
    for directory in ("adapter", "merged"):
        card = (tmp_path / directory / "README.md").read_text()
        assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
        assert str(tmp_path) not in card
        assert "base_model" not in card
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_a_card_that_cannot_be_read_says_nothing(bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["llama"], base)
    for content in (b"\xff\xfe", b"---\nlicense: [1\n---\n", b"---\nlicense: {a: b}\n---\n"):
        (base / "README.md").write_bytes(content)
        save_adapter(trained(base), tmp_path / "adapter")
        assert "license" not in yaml.safe_load((tmp_path / "adapter" / "README.md").read_text().split("---")[1])
