"""`n2uq predict --images`: the classes of image files, by name, in a table."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_n2uq.cli.command_parser import command_parser
from lightning_n2uq.utils.atomic import replacing
from lightning_n2uq.utils.validation import check, check_integer

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_n2uq.cli.trained import Trained
    from lightning_n2uq.datamodules._data.loose_images import LooseImages
    from lightning_n2uq.utils.preprocessing import Preprocessing

TOP = 5
_FEW = 64  # images that are loaded faster without processes of their own
_NAMED = 5  # broken files named one by one
Answer = tuple[list[str], list[float]] | str
"""The likeliest classes with their probabilities, or what is wrong with the file."""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Raises:
        ValueError: The user made a mistake; one line that names the argument.
    """
    options = parser().parse_args(argv)
    check_integer("batch_size", options.batch_size, 1)
    folder = Path(options.output).expanduser().parent
    check(folder.is_dir(), "output", options.output, "is a file in a folder that exists")
    from lightning_n2uq.cli.own_code import see_current_folder
    from lightning_n2uq.datamodules._data.loose_images import LooseImages, find_images

    source, names = find_images(options.images, "images")
    see_current_folder()
    from lightning_n2uq.cli.trained import load_trained

    trained = load_trained(options.ckpt_path)
    images = LooseImages(source, names, _steps(trained, options.ckpt_path))
    answers = _predict(trained, images, options)
    _write(options.output, names, answers)
    _say(options.output, names, answers)
    return 0


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    p = command_parser("predict", __doc__)
    p.add_argument(
        "--ckpt_path", "--ckpt", required=True, metavar="FILE", help="checkpoint of a trained network"
    )
    p.add_argument("--images", required=True, metavar="PATH", help="an image, a folder or a .zip of images")
    p.add_argument("-o", "--output", default="predictions.csv", metavar="FILE", help="table to write")
    p.add_argument("--batch_size", type=int, default=64, help="images at a time")
    p.add_argument("--num_workers", type=int, help="processes that load images (default: by their number)")
    p.add_argument("--device", default="cpu", help="cpu (the deployed network's answers) or cuda")
    return p


def _steps(trained: Trained, path: str) -> Preprocessing:
    steps = trained.preprocessing
    if steps is None or steps.channels not in (1, 3):
        raise ValueError(
            f"ckpt_path: {path!r} does not say how image files become its input; allowed are networks "
            "trained by a data module of images (ImageFolderDataModule, CIFAR10DataModule, ...)"
        )
    return steps


def _predict(trained: Trained, images: LooseImages, options: argparse.Namespace) -> list[Answer]:
    import torch

    from lightning_n2uq.cli.devices import device_of

    device = device_of(options.device)
    module = trained.module.to(device)
    answers: list[Answer] = [""] * len(images)
    for indices, pixels, broken in _batches(images, options):
        for index, error in broken:
            answers[index] = error
        if pixels is None:
            continue
        with torch.inference_mode():
            prediction = module.predict_step(pixels.to(device), 0)
        for index, answer in zip(indices, _named(prediction, trained.classes), strict=True):
            answers[index] = answer
    return answers


def _batches(
    images: LooseImages, options: argparse.Namespace
) -> Iterator[tuple[list[int], Tensor | None, list[tuple[int, str]]]]:
    import torch
    from torch.utils.data import DataLoader

    from lightning_n2uq.datamodules._data.loose_images import stacked
    from lightning_n2uq.datamodules._data.shared_memory import workers_with_room

    workers = options.num_workers
    if workers is None:
        workers = 0 if len(images) <= _FEW else min(8, os.cpu_count() or 1)
    check_integer("num_workers", workers, 0, 64)
    size = 4 * images.steps.channels * images.steps.crop**2 * options.batch_size
    loader = DataLoader(
        images,
        batch_size=options.batch_size,
        num_workers=workers_with_room(workers, size),
        collate_fn=stacked,
        generator=torch.Generator(),
    )
    yield from loader


def _named(prediction: object, classes: list[str] | None) -> Iterator[Answer]:
    """Yields the likeliest classes of every image."""
    import torch
    from torch import Tensor

    found = prediction.get("probabilities") if isinstance(prediction, dict) else prediction
    if not isinstance(found, Tensor) or found.dim() != 2:
        raise ValueError(
            f"predict_step: got {type(prediction).__name__}, allowed is a dictionary with 'probabilities' "
            "[B, classes]"
        )
    names = classes or [str(number) for number in range(found.shape[1])]
    check(len(names) == found.shape[1], "ckpt_path", len(names), f"are names of {found.shape[1]} classes")
    values, numbers = found.float().cpu().topk(min(TOP, found.shape[1]), dim=1)
    if not torch.isfinite(values).all():
        print("warning: some probabilities are not finite", file=sys.stderr)
    for row, places in zip(values.tolist(), numbers.tolist(), strict=True):
        yield [names[place] for place in places], row


def _write(path: str, names: list[str], answers: list[Answer]) -> None:
    most = max((len(answer[0]) for answer in answers if not isinstance(answer, str)), default=1)
    header = ["file", "class", "probability"]
    header += [f"{what}_{place}" for place in range(2, most + 1) for what in ("class", "probability")]
    with (
        replacing(Path(path).expanduser()) as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*header, "error"])
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, str):
                writer.writerow([name, *[""] * (2 * most), answer])
            else:
                pairs = zip(*answer, strict=True)
                writer.writerow(
                    [name, *(f"{x:.6f}" if isinstance(x, float) else x for p in pairs for x in p), ""]
                )


def _say(path: str, names: list[str], answers: list[Answer]) -> None:
    broken = [answer for answer in answers if isinstance(answer, str)]
    for line in broken[:_NAMED]:
        print(f"warning: {line}", file=sys.stderr)
    if len(broken) > _NAMED:
        print(f"warning: {len(broken) - _NAMED} more broken image files, see {path}", file=sys.stderr)
    whole = [answer for answer in answers if not isinstance(answer, str)]
    if len(names) == 1 and whole:
        (classes, values) = whole[0]
        print(f"{names[0]}: " + ", ".join(f"{c} {v:.3f}" for c, v in zip(classes, values, strict=True)))
    counts = Counter(answer[0][0] for answer in whole).most_common(10)
    shown = ", ".join(f"{name} {count}" for name, count in counts)
    print(f"{len(names)} images: {shown}{f'; {len(broken)} broken' if broken else ''}\npredictions: {path}")
