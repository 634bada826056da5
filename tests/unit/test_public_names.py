"""The names that `sparse_zero` exports: for Python by _HOME, for type checkers and editors by imports."""

import ast
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import sparse_zero


def test_type_checkers_see_the_names_that_python_finds():
    tree = ast.parse(Path(sparse_zero.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == alias.asname  # a plain `import x` is private to the module, PEP 484 says
    }
    assert seen == sparse_zero._HOME


@pytest.mark.parametrize("name", sparse_zero.__all__)
def test_every_name_is_there_under_its_own_name(name):
    assert getattr(sparse_zero, name).__name__ == name
    assert name in dir(sparse_zero)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sparse_zero' has no attribute 'sparsfy'"):
        _ = sparse_zero.sparsfy


def test_the_package_says_that_it_is_typed():
    assert resources.files("sparse_zero").joinpath("py.typed").is_file()


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import sparse_zero; print(*sorted(set(sys.modules) - before))"
    root = Path(sparse_zero.__file__).parents[1]
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=root, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()}
    assert imported - {"warnings"} == {"sparse_zero", "importlib"}  # importlib imports warnings up to Python 3.12
