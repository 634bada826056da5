"""Pages that repeat what the code says: signatures, messages, versions."""

import ast
import inspect
import re
import tomllib

import pytest
from docs_pages import ROOT, blocks, prose

import rpn
import sparse_zero

LIBRARY = ROOT / "docs" / "library.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"

PUBLIC = [(module, name) for module in (sparse_zero, rpn) for name in module.__all__]
WITHOUT_SIGNATURE = {"UserError", "Handle"}
"""One is raised, the other returned: nobody builds them."""


# The library


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda value: getattr(value, "__name__", value))
def test_a_public_name_is_described_with_its_signature(module, name: str) -> None:
    text = LIBRARY.read_text(encoding="utf-8")
    assert re.search(rf"^### {name}$", text, re.M), f"{name} is not described"
    if name in WITHOUT_SIGNATURE:
        return
    shown = re.search(rf"^### {name}\n\n```text\n{name}(\(.*?\))(?: -> [^\n]+)?\n```", text, re.M | re.S)
    assert shown, f"{name} has no signature"
    assert parameters_of(shown[1]) == [
        (each.name, each.kind, each.default) for each in inspect.signature(getattr(module, name)).parameters.values()
    ]


def parameters_of(shown: str) -> list[tuple]:
    """(name, kind, default) of each parameter of a signature in parentheses."""
    namespace: dict = {}
    exec(f"def shown{shown}: pass", namespace)
    return [(each.name, each.kind, each.default) for each in inspect.signature(namespace["shown"]).parameters.values()]


def test_no_other_name_is_described_as_public() -> None:
    text = LIBRARY.read_text(encoding="utf-8")
    described = re.findall(r"^### (\w+)$", text[text.index("## Reference") :], re.M)
    assert sorted(described) == sorted(name for _, name in PUBLIC)


# Messages


def string_pieces() -> list[str]:
    """The constant parts of all strings in the code but docstrings, those of an f-string one by one."""
    found = []
    for package in ("sparse_zero", "launcher", "rpn"):
        for file in (ROOT / package).rglob("*.py"):
            nodes = [*ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            strings = (n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
            found += [node.value for node in strings if id(node) not in docstrings]
    return found


def messages() -> list[tuple[str, str]]:
    return [(block.id, block.text.strip()) for block in blocks(TROUBLESHOOTING, "text")]


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    pieces = string_pieces()
    absent = [
        (where, part)
        for where, message in messages()
        for part in map(str.strip, message.split("…"))
        if part and not any(part in piece for piece in pieces)
    ]
    assert not absent, "no string in the code contains these"


def test_every_symptom_has_a_cause_and_a_remedy() -> None:
    entries = re.split(r"^### ", prose(TROUBLESHOOTING), flags=re.M)[1:]
    assert len(entries) >= 25
    for entry in entries:
        assert len(re.findall(r"^- \*\*Cause\.\*\* ", entry, re.M)) == 1, entry
        assert len(re.findall(r"^- \*\*Remedy\.\*\* ", entry, re.M)) == 1, entry


# Versions


def test_the_versions_of_the_readme_are_those_that_are_pinned_and_required() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    tested = re.search(r"Tested together .*?: (.*?)\.\s[A-Z]", readme)[1]
    least = re.search(r"Minimum versions: (.*?)\.\s[A-Z]", readme)[1]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least_of = dict(each.split(">=") for each in required if ">=" in each)
    for shown in tested.split(", "):
        name, number = shown.lower().split()
        assert pins[name].startswith(f"{number}."), shown
    for shown in least.split(", "):
        name, number = shown.lower().split()
        assert least_of[name] == number, shown
