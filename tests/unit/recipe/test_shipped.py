"""The files that are installed with the package."""

from pathlib import Path

import pytest
import yaml

from sparse_zero.errors import UserError
from sparse_zero.recipe import shipped

REPOSITORY = Path(__file__).parents[3]


def test_the_repositorys_configs_are_the_shipped_files():
    assert (REPOSITORY / "configs").resolve() == shipped.directory().resolve()
    assert set(shipped.names()) == {file.name for file in (REPOSITORY / "configs").iterdir()}


def test_every_file_is_described_in_one_line():
    described = shipped.describe()
    assert [file.name for file in described] == shipped.names()
    assert [*dict.fromkeys(file.kind for file in described)] == ["recipe", "DeepSpeed file", "batch script"]
    for file in described:
        assert 20 < len(file.about) < 130, file
        assert file.about.isprintable()
    assert len({file.about for file in described}) == len(described)


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("zero1.json", "ZeRO stage 1: partitions optimizer state"),
        ("zero2_offload.json", "ZeRO stage 2: partitions optimizer state and gradients; offloads the optimizer"),
        ("zero3.json", "ZeRO stage 3: partitions optimizer state, gradients and parameters"),
        ("single-node.sbatch", "One node, one rank for each of its GPUs"),
    ],
)
def test_descriptions(name, about):
    assert next(file.about for file in shipped.describe() if file.name == name) == about


@pytest.mark.parametrize("name", shipped.names(".yaml"))
def test_a_recipes_description_is_its_first_comment(name):
    first = (shipped.directory() / name).read_text().splitlines()[0].removeprefix("# ")
    assert next(file.about for file in shipped.describe() if file.name == name) == first.rstrip(".:")


def test_a_file_is_found_by_its_name_alone_or_as_in_a_checkout():
    assert shipped.find("demo.yaml") == shipped.directory() / "demo.yaml"
    assert shipped.find("configs/zero2.json") == shipped.directory() / "zero2.json"
    for name in ("demo", "other/demo.yaml", "/demo.yaml", "../configs/demo.yaml", "nowhere.yaml", "", "."):
        assert shipped.find(name) is None, name
    assert shipped.find("zero2.json", ".yaml", ".yml") is None


def test_copy_writes_here_or_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original = (shipped.directory() / "demo.yaml").read_bytes()
    (tmp_path / "some").mkdir()
    for to, written in ((None, "demo.yaml"), ("mine.yaml", "mine.yaml"), ("some", "some/demo.yaml")):
        assert shipped.copy("demo.yaml", to) == Path(written)
        assert Path(written).read_bytes() == original
    assert yaml.safe_load(Path("mine.yaml").read_text())["model"]


def test_copy_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"^demo\.yaml: already exists; remove it, or name another file"):
        shipped.copy("demo.yaml")
    assert Path("demo.yaml").read_text() == "mine"


def test_what_cannot_be_copied(tmp_path):
    with pytest.raises(
        UserError, match=r"^demo\.yml: sparse-zero ships no file of that name; did you mean 'demo\.yaml'\?$"
    ):
        shipped.copy("demo.yml")
    with pytest.raises(UserError, match=r"^zzzz: .*; there are causal-lm-chat\.yaml, .*zero1\.json, .*sbatch$"):
        shipped.copy("zzzz")
    with pytest.raises(UserError, match=r"no/where\.yaml: cannot be written \(No such file or directory\)"):
        shipped.copy("demo.yaml", tmp_path / "no" / "where.yaml")
