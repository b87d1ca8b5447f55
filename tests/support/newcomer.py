"""The commands that docs/own_images.md gives to somebody who has a folder of images."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from own_photos import KINDS, write_photos

DOCS = Path(__file__).parents[2] / "docs"
TINY = [
    "--model.backbone_args", "{width: 4}", "--data.image_size", "16", "--trainer.max_epochs", "4",
    "--model.lr", "0.01",
]  # fmt: skip
"""What makes the documented `n2uq fit` a matter of seconds."""
Run = Callable[[list[str]], str]
"""Runs a command in the newcomer's folder and returns what it printed; raises where it failed."""


def commands() -> list[str]:
    """Returns the documented commands, one a line."""
    page = (DOCS / "own_images.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    return block.splitlines()


def script() -> str:
    """Returns the documented script that runs the exported network without this package."""
    page = (DOCS / "deployment.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(# classify.py: .*?)^```$", page, re.DOTALL | re.MULTILINE)
    return block


def follow(folder: Path, run: Run, *more: str) -> None:
    """Follows the documentation in a folder, from pictures to a deployed network with the same answers.

    Args:
        folder: An empty folder.
        run: Runs a command there.
        more: Further arguments of `n2uq fit`.
    """
    write_photos(folder / "photos", 30)
    write_photos(folder / "new_photos", 4, (40, 50))
    (folder / "classify.py").write_text(script(), encoding="utf-8")
    files = [f"new_photos/{kind}/{number:03}.jpg" for kind in KINDS for number in range(4)]
    for command in commands():
        words = [word for text in command.split() for word in _filled(text, folder, files)]
        if words[:2] == ["n2uq", "fit"]:
            words += [*TINY, *more]
        _check(words, run(words), folder, files)


def _filled(word: str, folder: Path, files: list[str]) -> Iterator[str]:
    """Yields a word with the run's folder in the place of `TIME`; the two named photos stand for all."""
    if word.endswith("/1.jpg"):
        yield from files
    elif not word.endswith("/2.jpg"):
        runs = [path.name for path in folder.glob("runs/images/n2uq_w2a2/*") if path.is_dir()]
        yield word.replace("TIME", min(runs)) if "TIME" in word else word


def _check(words: list[str], printed: str, folder: Path, files: list[str]) -> None:
    if words[1] == "fit":
        accuracy = re.search(r"test/acc\D*([\d.]+)", printed)
        assert accuracy, printed
        assert float(accuracy[1]) > 0.8, printed
    elif words[1] == "report":
        (page,) = folder.rglob("report.html")
        text = page.read_text(encoding="utf-8")
        rows = re.findall(r'<tr><th scope="row">(\w+)</th><td>[\d.]+% of \d+</td></tr>', text)
        assert rows == list(KINDS)  # the accuracy of each class
    elif words[1] == "export":
        assert "parity: all engines agree" in printed, printed
        assert "output logits: apple, leaf, sky" in printed, printed
    if words[0] != "python":
        return
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as table:
        predicted = {f"new_photos/{row['file']}": row["class"] for row in csv.DictReader(table)}
    deployed = dict(line.rsplit(" ", 1) for line in printed.strip().splitlines())
    assert deployed == predicted
    right = sum(name.split("/")[1] == answer for name, answer in deployed.items())
    assert list(deployed) == files
    assert right >= 0.8 * len(files), deployed
