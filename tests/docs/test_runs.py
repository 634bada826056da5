"""The fenced commands and Python blocks of the pages, run in their order on tiny models.

Nothing is changed in them but the names in `tiny_models` and the options in ADDED. What is not run stands in NOT_RUN.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT, Block, blocks, here_document, name_of, statements, words_of

from launcher import cli
from sparse_zero.adapters.files import read_config
from sparse_zero.ranks.network import free_port

RUN_WHOLLY = ("README.md", "docs/getting-started.md")
"""Pages of which every command and every Python block is run."""

ADDED = {"train": ("launch.launcher=local", "launch.processes_per_node=1")}
"""Options of subcommands: one rank, started directly, which spares two starts of Python."""

NOT_RUN = {
    "make demo": "trains for two minutes; the test of the wheel runs its recipe on fewer sentences",
    "make demo-llm": "trains for ten minutes; a test of its model runs its recipe on fewer problems",
    "make test": "runs these tests",
    "pip install --constraint constraints.txt .": "needs a package index; the tests of the wheel install it",
}
"""Commands, and why they are not run."""


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [ROOT / name for name in RUN_WHOLLY], ids=name_of)
def test_every_block_runs(page: Path, directory: Path, tiny_models: dict[str, str]) -> None:
    namespace: dict = {}
    for block in blocks(page, "bash", "python"):
        if block.language == "python":
            run_python(block, namespace, tiny_models)
        else:
            run_shell(block, tiny_models)
    if page.name == "README.md":  # what TRL's own trainer has saved
        assert read_config("adapter").sparse.targets == "all-linear"
        assert not Path("adapter", "model.safetensors").exists()


def substituted(text: str, names: dict[str, str]) -> str:
    for name, here in names.items():
        text = text.replace(name, here)
    return text


def run_python(block: Block, namespace: dict, names: dict[str, str]) -> None:
    # Empty lines before it, so that a traceback has the page's line numbers
    code = compile("\n" * block.line + substituted(block.text, names), block.page, "exec")
    exec(code, namespace)


def run_shell(block: Block, names: dict[str, str]) -> None:
    for statement in statements(block.text):
        command = re.split(r"\s+#", statement)[0]
        if command in NOT_RUN:
            continue
        if file := here_document(statement):
            Path(file[0]).write_text(substituted(file[1], names), encoding="utf-8")
        else:
            assert command.startswith("sparse-zero "), f"{block.id}: {command}: run it, or name it in NOT_RUN"
            run_command(block, words_of(substituted(command, names)))


def run_command(block: Block, words: list[str]) -> None:
    """A run's ranks in processes of their own, the rest in this one, which has imported torch already."""
    words += ADDED.get(words[0], ()) if "--dry-run" not in words else ()
    if words[0] == "train":
        done = subprocess.run([sys.executable, "-m", "launcher", *words], capture_output=True, text=True)
        assert done.returncode == 0, f"{block.id}: sparse-zero {shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return
    try:
        status = cli.main(words)
    except SystemExit as end:  # of --help and --version
        status = end.code
    assert status == 0, f"{block.id}: sparse-zero {shlex.join(words)}"


def test_what_is_not_run_stands_on_a_page() -> None:
    shown = {
        re.split(r"\s+#", statement)[0]
        for page in PAGES
        if name_of(page) in RUN_WHOLLY
        for block in blocks(page, "bash")
        for statement in statements(block.text)
    }
    assert set(NOT_RUN) <= shown


@pytest.mark.parametrize("name", ["docs/index.md", "docs/adapters.md"])
def test_python_blocks_run(name: str, directory: Path, tiny_models: dict[str, str]) -> None:
    namespace: dict = {}
    found = blocks(ROOT / name, "python")
    assert found
    for block in found:
        run_python(block, namespace, tiny_models)


def test_the_loops_of_the_page_on_the_library_run(directory: Path, tiny_models: dict[str, str]) -> None:
    """As the only rank of a run: DeepSpeed and Accelerate keep state for as long as a process lives."""
    found = blocks(ROOT / "docs" / "library.md", "python")
    assert len(found) == 6
    Path("loops.py").write_text("\n".join(substituted(block.text, tiny_models) for block in found))
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **place, "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "loops.py"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("adapter-torch", "adapter-accelerate", "adapter-deepspeed", "out/adapter", "out/checkpoint-2"):
        assert Path(name).is_dir()
