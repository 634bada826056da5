"""The pages of the documentation, and the fenced blocks, commands and links in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("CONTRIBUTING.md")])

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.M | re.S)
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_HERE_DOCUMENT = re.compile(r"cat > (\S+) <<'(\w+)'$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """The page's path below the repository."""
    line: int
    """Of the opening fence, from 1."""
    language: str
    text: str

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page, in their order; of these languages only, if some are given."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        inner = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        if not languages or match["language"] in languages:
            found.append(Block(name_of(page), line, match["language"], inner))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    """The code spans of a page's prose, each on one line."""
    return [" ".join(span.split()) for span in _CODE.findall(prose(page))]


def statements(script: str) -> Iterator[str]:
    """The commands of a shell block: continued lines joined, here-documents kept with the command that reads them."""
    lines = iter(script.splitlines())
    for line in lines:
        while line.endswith("\\"):
            line = line[:-1] + next(lines)
        if match := _HERE_DOCUMENT.match(line):
            body = []
            while (following := next(lines)) != match[2]:
                body.append(following)
            yield "\n".join([line, *body, match[2]])
        elif line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def here_document(statement: str) -> tuple[str, str] | None:
    """(file, contents) of `cat > FILE <<'END'`; None for any other command."""
    first, _, rest = statement.partition("\n")
    match = _HERE_DOCUMENT.match(first)
    return (match[1], rest.rsplit("\n", 1)[0] + "\n") if match else None


def words_of(command: str) -> list[str]:
    """The words of a `sparse-zero` command, without the program, a comment and what follows a pipe or redirection."""
    words = shlex.split(command, comments=True)
    assert words[0] == "sparse-zero"
    end = next((index for index, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
    return words[1:end]


def sparse_zero_commands(page: Path) -> list[tuple[str, list[str]]]:
    """(where, words) of every `sparse-zero` command line of a page, in blocks and in code spans of its prose.

    A code span that only names a subcommand, such as `sparse-zero train`, is no command line.
    """
    found = []
    for block in blocks(page, "bash", "console", "sh", "shell", ""):
        for statement in statements(block.text):
            line = re.sub(r"^(\$ )?(\w+=\S+ )*", "", statement)
            if line.startswith("sparse-zero "):
                found.append((block.id, words_of(line)))
    for span in inline_code(page):
        if re.match(r"sparse-zero (\S+ |-|keys|recipes|doctor)", span):
            found.append((name_of(page), words_of(span)))
    return found


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}
