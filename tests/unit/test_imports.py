"""The rooms of the house: imports between packages run one way, none runs in a circle, and each package says what
others may import from it.
"""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

ORDER = (
    *("sparse_zero.errors", "sparse_zero.json_text", "rpn"),
    *("sparse_zero.zero", "sparse_zero.ranks"),
    "sparse_zero.quantized",
    "sparse_zero.selection",
    *("sparse_zero.gradient", "sparse_zero.recipe"),
    *("sparse_zero.model", "sparse_zero.data"),
    *("sparse_zero.adapters", "sparse_zero.planning"),
    *("sparse_zero.checkpoint", "sparse_zero.peft"),
    "sparse_zero.generation",
    "sparse_zero.training",
    "sparse_zero.trl",
    "sparse_zero.train",
    *("launcher.report", "launcher.ways", "launcher.processes", "launcher.jobs", "launcher.doctor"),
    *(
        "launcher.accelerator",
        "launcher.answering",
        "launcher.answering_options",
        "launcher.parser",
        "launcher.supervise",
        "launcher.plan_report",
        "launcher.data_report",
        "launcher.recipe_keys",
        "launcher.run_commands",
        "launcher.run_options",
        "launcher.recipe_commands",
        "launcher.recipe_options",
        "launcher.adapter_commands",
        "launcher.adapter_options",
        "launcher.comparison",
    ),
    "launcher.cli",
    "launcher.__main__",
)
"""From the ground up: each may import from those before it."""

FACADES = ("sparse_zero", "launcher")
"""They only hold packages; `sparse_zero` imports what users ask it for by name."""


def modules() -> dict[str, Path]:
    files = [file for name in ("sparse_zero", "rpn", "launcher") for file in (REPOSITORY / name).rglob("*.py")]
    paths = {file: file.relative_to(REPOSITORY).with_suffix("").parts for file in files}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): file for file, parts in paths.items()}


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a file names: in imports, wherever they stand, and in words such as `-m sparse_zero.train`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write the whole name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


IMPORTS = {
    module: {name for name in imported(ast.parse(file.read_text())) if name in MODULES} - {module, *FACADES}
    for module, file in MODULES.items()
    if module not in FACADES
}


def room(module: str) -> str:
    """The entry of ORDER that a module belongs to."""
    return next(name for name in ORDER if module == name or module.startswith(f"{name}."))


def between_rooms() -> Iterator[tuple[str, str]]:
    for module, names in IMPORTS.items():
        yield from ((module, name) for name in names if room(module) != room(name))


def test_the_graph_is_read():
    assert "sparse_zero.selection.rules" in IMPORTS["sparse_zero.model.weight_values"]
    assert "sparse_zero.gradient.triton_writes" in IMPORTS["sparse_zero.model.weight_values"], "within functions"
    assert "sparse_zero.train" in IMPORTS["launcher.ways.command"], "modules that are started by name"
    assert len(set(between_rooms())) > 100


def test_every_module_has_a_room():
    assert {room(module) for module in IMPORTS} == set(ORDER)
    assert sorted(file.name for file in (REPOSITORY / "sparse_zero").glob("*.py")) == [
        *("__init__.py", "errors.py", "json_text.py", "train.py")
    ]


def test_imports_between_rooms_run_one_way():
    upwards = [f"{a} -> {b}" for a, b in between_rooms() if ORDER.index(room(a)) < ORDER.index(room(b))]
    assert upwards == []


def test_no_module_imports_from_the_facade():
    """Its names may belong to a higher room, which the graph does not show."""
    trees = {module: ast.parse(file.read_text()) for module, file in MODULES.items() if module not in FACADES}
    assert [module for module, tree in trees.items() if "sparse_zero" in set(imported(tree))] == []


def test_no_imports_run_in_a_circle():
    assert list(graphlib.TopologicalSorter(IMPORTS).static_order())


def test_a_circle_would_be_found():
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"a"}}).static_order())


@pytest.mark.parametrize("page", ["docs/internals.md", "CONTRIBUTING.md"])
def test_a_page_shows_the_order_from_the_top(page):
    shown = re.findall(r"^\| `(launcher|rpn|sparse_zero/[\w.]+)` \|", (REPOSITORY / page).read_text(), re.M)
    names = [name.removesuffix(".py").replace("/", ".") for name in shown]
    assert names == [*dict.fromkeys("launcher" if n.startswith("launcher") else n for n in reversed(ORDER))]


PACKAGES = sorted({room(module) for module in IMPORTS if MODULES[module].name == "__init__.py"} - {"rpn"})


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_others_may_import(package):
    """Its docstring ends with `Others import from ...`, which names these modules and no more."""
    docstring = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert docstring, f"{package} does not say what it is for"
    said = set(re.findall("`([a-z_.]+)`", docstring.partition("Others import from")[2]))
    used = {b.removeprefix(f"{package}.") for _, b in between_rooms() if room(b) == package}
    public = {
        name.removeprefix(f"{package}.")
        for name in re.findall('"(sparse_zero[a-z_.]+)"', MODULES["sparse_zero"].read_text())
        if room(name) == package
    }
    assert said == used | public
