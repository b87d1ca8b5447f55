"""Hooks of the site: the front page from README.md, the reference from the code, links that leave docs/."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import reference

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "build" / "site-sources"
MAPPED = ("callbacks", "datamodules", "configs")  # folders at the top that are installed inside the package


@event_priority(100)  # mkdocstrings forgets search paths that do not exist when its turn comes
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lays the package out as it is installed, and names the pages of the reference."""
    package = SOURCES / "lightning_n2uq"
    shutil.rmtree(SOURCES, ignore_errors=True)
    unread = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc")
    shutil.copytree(ROOT / "lightning_n2uq", package, ignore=unread)
    for name in MAPPED:
        shutil.copytree(ROOT / name, package / name, ignore=unread)
    for section in config.nav or []:
        for entry in section.get("Reference", []) if isinstance(section, dict) else []:
            if isinstance(entry, dict) and "Python" in entry:
                entry["Python"] = [f"reference/{name}.md" for name in reference.PACKAGES]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made of something else."""
    made = {
        "index.md": _inside_docs((ROOT / "README.md").read_text(encoding="utf-8")),
        "changelog.md": _inside_docs((ROOT / "CHANGELOG.md").read_text(encoding="utf-8")),
        **reference.pages(SOURCES),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:  # noqa: ANN401 -- MkDocs passes more
    """Lets links to the README lead to the front page, and those to other files of the project be text."""
    text = markdown.replace("](../README.md", "](index.md").replace("](../CHANGELOG.md", "](changelog.md")
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", text)


def _inside_docs(text: str) -> str:
    """Turns links from the project's root into links from `docs/`."""
    text = re.sub(r"\]\((?:https://raw\.[^)]*/)?docs/", "](", text).replace(
        "](CHANGELOG.md", "](changelog.md"
    )
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)(?![\w/]+\.(?:md|png|svg))[^)]*\)", r"\1", text)
