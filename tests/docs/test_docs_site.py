"""The documentation as a site: all pages in the navigation, all public names and keys in the reference."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest

import apart
from lightning_n2uq import __version__

ROOT = Path(__file__).resolve().parents[2]


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    missing = {path.name for path in (ROOT / "docs").glob("*.md")} - named
    assert missing == set()


def test_what_a_stranger_looks_for_is_there() -> None:
    for name in ("CONTRIBUTING.md", "CITATION.cff", ".github/ISSUE_TEMPLATE/bug_report.yml", "MANIFEST.in"):
        assert (ROOT / name).is_file()
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_has_every_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed: `make docs` installs it")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    apart.run(build, ROOT, {**os.environ, "NO_MKDOCS_2_WARNING": "1"}, timeout=1800)
    site = tmp_path / "site"
    for package in ("callbacks", "datamodules", "modules", "strategies", "quantizers", "compression"):
        text = (site / "reference" / f"{package}.html").read_text()
        names = importlib.import_module(f"lightning_n2uq.{package}").__all__
        assert [name for name in names if f'id="lightning_n2uq.{package}.{name}"' not in text] == []
    keys = (site / "reference" / "config_keys.html").read_text()
    for key in ("weight_bits", "activation_quantizer", "root", "trainer.max_epochs", "guard.loss", "resume"):
        assert f"<code>{key}</code>" in keys, key
