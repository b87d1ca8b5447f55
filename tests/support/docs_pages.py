"""What README and the pages of docs/ hold: snippets, commands, links, paths and names of tests."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = ("n2uq ", "make ", "python ", "pip ", "pytest ", "wandb ")
_SHELL = ("", "sh")


@dataclass(frozen=True)
class Piece:
    """A snippet, a command or a reference, and where it stands."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


@cache
def _tokens(page: Path) -> list[tuple[Token, int]]:
    found, line = [], 0
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text()):
        line = token.map[0] + 1 if token.map else line
        found.append((token, line))
        found += [(child, line) for child in token.children or ()]
    return found


def snippets(language: str) -> list[Piece]:
    """Fenced blocks of a language."""
    found = []
    for page in PAGES:
        for token, line in _tokens(page):
            if token.type == "fence" and token.info.strip() == language:
                found.append(Piece(page.name, line, token.content))
    return found


def inline_code() -> list[Piece]:
    """What stands between single backticks, on one line."""
    return [
        Piece(page.name, line, " ".join(token.content.split()))
        for page in PAGES
        for token, line in _tokens(page)
        if token.type == "code_inline"
    ]


def commands() -> list[Piece]:
    """Every command of blocks and of running text, continued lines joined and comments cut off."""
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which tells of the past, too
    named = {page.name for page in pages}
    found = [piece for piece in inline_code() if piece.text.startswith(_PROGRAMS) and piece.page in named]
    for page in pages:
        for token, line in _tokens(page):
            if token.type == "code_block" or (token.type == "fence" and token.info.strip() in _SHELL):
                found += [Piece(page.name, line, text) for text in _lines(token.content)]
    return found


def _lines(block: str) -> Iterator[str]:
    """Commands of a block; what a shell runs as one (a loop, quotes over lines) stays one."""
    text = block.replace("\\\n", " ")
    if text.count('"') % 2 == 0 and re.search(r'"[^"\n]*\n', text):
        yield text.strip()
        return
    for line in text.splitlines():
        command = re.sub(r"\s+#.*", "", line).strip()
        if command:
            yield " ".join(command.split())


def words(command: str) -> list[str]:
    """The words of a command, without assignments in front."""
    found = shlex.split(command)
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        del found[0]
    return found


def links() -> list[Piece]:
    """Targets of links and images that are not on the web."""
    found = []
    for page in PAGES:
        for token, line in _tokens(page):
            target = (
                token.attrGet("href") or token.attrGet("src")
                if token.type in ("link_open", "image")
                else None
            )
            if target and not re.match(r"[a-z]+:", str(target)):
                found.append(Piece(str(page.relative_to(ROOT)), line, str(target)))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that a code host makes of a page's headings."""
    pairs = itertools.pairwise(token for token, _ in _tokens(page))
    titles = [after.content for token, after in pairs if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
