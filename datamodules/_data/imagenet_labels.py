"""Files that say which ImageNet image or class has which number."""

import json
import re
from pathlib import Path

from lightning_n2uq.datamodules._data.base import existing_path

_WNID = re.compile(r"n\d{8}")


def read_class_index(path: str, count: int) -> list[str]:
    """Reads `imagenet_class_index.json`: `{"0": ["n01440764", "tench"], ...}`.

    Args:
        path: The file to read.
        count: The number of classes that it must list.

    Returns:
        WordNet ids in the order of their numbers.

    Raises:
        ValueError: The file is missing, is not of that form, or lists another number of classes.
    """
    file = existing_path("class_index", path, 'a JSON file {"0": ["n01440764", "tench"], ...}')
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        wnids = [str(table[str(number)][0]) for number in range(len(table))]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f'class_index: got {path!r}, which is not of the form {{"0": ["n01440764", "tench"], ...}}'
        ) from error
    if len(wnids) != count:
        raise ValueError(f"class_index: got {path!r} with {len(wnids)} classes, allowed are {count}")
    return wnids


def read_val_labels(path: str, classes: list[str]) -> dict[str, int]:
    """Reads a table of the validation images: a file name and a class per line.

    The separator is a space or a comma; the class is a WordNet id or a number from 0 in the WordNet ids'
    alphabetical order, and what follows it is ignored. Both `LOC_val_solution.csv` (its header line is
    passed over) and the common `val.txt` are of this form. The development kit's own ground truth file is
    not: it names no images and counts classes in another order, so it is refused.

    Args:
        path: The file to read.
        classes: WordNet ids in the order of their numbers.

    Returns:
        Class number by file name without folder and suffix.

    Raises:
        ValueError: The file is missing, or a line is of another form; the message holds the line's number.
    """
    file = existing_path("val_labels", path, "a text file with a file name and a class per line")
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    labels: dict[str, int] = {}
    for row, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        fields = re.split(r"[\s,]+", line.strip())
        if fields == [""] or (row == 1 and fields[0] == "ImageId"):
            continue
        number = _class_number(fields[1], numbers) if len(fields) > 1 else None
        if number is None:
            raise ValueError(
                f"val_labels: got {path!r}, whose line {row} is {line[:60]!r}; expected a file name and a"
                f" WordNet id or a number 0..{len(classes) - 1}"
            )
        labels[Path(fields[0]).stem] = number
    return labels


def _class_number(text: str, numbers: dict[str, int]) -> int | None:
    if _WNID.fullmatch(text):
        return numbers.get(text)
    return int(text) if text.isdecimal() and int(text) < len(numbers) else None
