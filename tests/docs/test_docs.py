"""README and docs: links, paths, named tests and flags exist, and the Python snippets run."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import docs_pages
from docs_pages import ROOT, Piece
from lightning_n2uq.cli.commands import COMMANDS, TRAINING_COMMANDS
from lightning_n2uq.modules import QuantizedClassifier

_TOPS = ("", "lightning_n2uq", "lightning_n2uq/ops", "lightning_n2uq/ops/backends", "lightning_n2uq/export")
PACKAGE = (*_TOPS, "benchmarks", "tests", "tests/support")  # where a path of the docs may begin
PATH = re.compile(r"(?:[\w.-]+/)+[\w-]+\.(?:py|md|json|jsonl|yaml|svg|png)|(?:[a-z]\w*/)+")
NO_PATHS = (
    "runs/",
    "comm/",
    "quant/",
    "benchmarks/results/mutants.json",
)  # made by runs; families of metrics


def named_paths() -> list[Piece]:
    found = [piece for piece in docs_pages.inline_code() if PATH.fullmatch(piece.text)]
    return [piece for piece in found if piece.page != "CHANGELOG.md" and not piece.text.startswith(NO_PATHS)]


def named_tests() -> list[Piece]:
    found = docs_pages.inline_code()
    return [
        piece for piece in found if re.fullmatch(r"test_\w+", piece.text) and piece.page != "CHANGELOG.md"
    ]


@cache
def defined_tests() -> set[str]:
    sources = (path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    return {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.MULTILINE)}


def test_something_is_found_of_every_kind() -> None:
    assert len(docs_pages.links()) > 20
    assert len(docs_pages.commands()) > 40
    assert len(docs_pages.snippets("python")) >= 5
    assert len(named_paths()) > 20
    assert len(named_tests()) > 30


def test_links_lead_somewhere() -> None:
    broken = []
    for link in docs_pages.links():
        path, _, anchor = link.text.partition("#")
        page = ROOT / link.page
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in docs_pages.anchors(target)):
            broken.append(str(link))
    assert not broken, "\n".join(broken)


def test_paths_exist() -> None:
    missing = [str(p) for p in named_paths() if not any((ROOT / top / p.text).exists() for top in PACKAGE)]
    assert not missing, "\n".join(missing)


def test_named_tests_exist() -> None:
    missing = [str(piece) for piece in named_tests() if piece.text not in defined_tests()]
    assert not missing, "\n".join(missing)


@cache
def flags_of(*sources: Path) -> set[str]:
    """Strings in the code that look like flags; also names, from which some commands make theirs."""
    trees = [ast.parse(path.read_text()) for path in sources]
    constants = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    names = {text for text in constants if isinstance(text, str) and re.fullmatch(r"[\w-]+", text)}
    return {name if name.startswith("-") else f"--{name}" for name in names}


def sources_of(words: list[str]) -> list[Path] | None:
    """The files whose flags a command of this repository takes; None for another program."""
    if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
        place = ROOT.joinpath(*words[2].split("."))
        sources = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        return [*sources, ROOT / "benchmarks" / "__main__.py"] if words[2] == "benchmarks" else sources
    if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
        return [ROOT / words[1]]
    if words[0] == "n2uq" and len(words) > 1 and words[1] in COMMANDS:
        return sorted((ROOT / "lightning_n2uq").rglob("*.py"))
    return None


@pytest.mark.integration
def test_flags_of_commands_exist() -> None:
    """Those of training commands are dotted keys, which `make docs-check` gives to the parser."""
    unknown = []
    for command in docs_pages.commands():
        words = docs_pages.words(command.text)
        sources = sources_of(words) if len(words) > 1 else None
        if sources is None:
            continue
        given = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)} - {"-m", "--help"}
        missing = given - flags_of(*sources)
        if missing or not all(path.exists() for path in sources):
            unknown.append(f"{command} ({', '.join(sorted(missing))})")
    assert not unknown, "\n".join(unknown)


def test_commands_and_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    unknown = []
    for command in docs_pages.commands():
        program, *rest = docs_pages.words(command.text)
        name = rest[0] if rest else ""
        if program == "make" and name not in targets:
            unknown.append(str(command))
        known = {*COMMANDS, *TRAINING_COMMANDS, "--help", "--version"}
        if program == "n2uq" and not set(re.split(r"[,/ ]+", name)) <= known:
            unknown.append(str(command))
    assert not unknown, "\n".join(unknown)


def test_named_configs_exist() -> None:
    missing = [
        str(command)
        for command in docs_pages.commands()
        for name in re.findall(r"--config[ =]([\w/.-]+\.yaml)", command.text)
        if not any((folder / name).exists() for folder in (ROOT / "configs", ROOT, ROOT / "examples"))
    ]
    assert not missing, "\n".join(missing)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What the snippets take for granted: a folder with a checkpoint, a model, DDP of one process, images."""
    folder = tmp_path_factory.mktemp("snippets")
    classifier = QuantizedClassifier(backbone="resnet20", num_classes=10, in_channels=3, image_size=32).eval()
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(classifier)
    trainer.save_checkpoint(folder / "best.ckpt")
    images = torch.randn(2, 3, 32, 32)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    yield {
        "folder": folder,
        "model": classifier,
        "images": images,
        "batches": [images],
        "rank": 0,
        "DistributedDataParallel": DistributedDataParallel,
        "ddp": DistributedDataParallel(nn.Linear(4, 4)),
    }
    torch.distributed.destroy_process_group()


@pytest.mark.integration
@pytest.mark.parametrize(
    "snippet", docs_pages.snippets("python"), ids=lambda piece: f"{piece.page}-{piece.line}"
)
@pytest.mark.filterwarnings("default")
def test_python_snippets_run(
    snippet: Piece, stand_ins: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stand_ins["folder"])
    exec(compile(snippet.text, str(snippet), "exec"), dict(stand_ins))
