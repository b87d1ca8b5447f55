"""Real text that needs no download: the language reference that comes with Python, byte by byte."""

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.loading import Split, SplitDataModule
from lightning_n2uq.datamodules._data.tensors import NamedTensorRows
from lightning_n2uq.utils.validation import check, check_integer, check_number

VOCABULARY = 256


class PythonDocsTextDataModule(SplitDataModule):
    """Pieces of the topics that Python's `help()` shows (some 460 kB), for `CausalLanguageModel`.

    A batch is a mapping with `input_ids [B, length]` int64, bytes of UTF-8. The pieces of a split are
    consecutive: the first part of the text is for training, the next for validation, the last for the test.

    Args:
        length: The bytes of a piece.
        val_fraction: The share of the pieces for validation, in (0, 1).
        test_fraction: The share of the pieces for the test, in (0, 1).
        max_pieces: The largest number of pieces in all; None for no limit.
        batch_size: Pieces per step and process.
        seed: The seed of the order.
        num_workers: Loader processes; 0 is the fastest.
        drop_last: Leaves out the last, smaller batch of a training epoch.

    Raises:
        ValueError: An argument is out of range, or the limit leaves a split empty.
    """

    samples = "pieces"

    def __init__(
        self,
        length: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        max_pieces: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed, drop_last=drop_last)
        self.length = check_integer("length", length, 2)
        check_number("val_fraction", val_fraction, 0.0, 1.0, above=True, below=True)
        check_number("test_fraction", test_fraction, 0.0, 1.0, above=True, below=True)
        fits = val_fraction + test_fraction < 1
        check(fits, "val_fraction", val_fraction, "is one that is below 1 together with test_fraction")
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.max_pieces = None if max_pieces is None else check_integer("max_pieces", max_pieces, 3)

    def sample_bytes(self) -> int:
        """Returns the size of a piece as integers of 64 bits."""
        return 8 * self.length

    def load_split(self, split: Split) -> NamedTensorRows:
        """Returns the pieces of one split."""
        data = _text()
        pieces = data[: len(data) // self.length * self.length].view(-1, self.length)[: self.max_pieces]
        val, test = (round(len(pieces) * share) for share in (self.val_fraction, self.test_fraction))
        parts = dict(
            zip(("train", "val", "test"), pieces.split([len(pieces) - val - test, val, test]), strict=True)
        )
        allowed = f"leaves pieces for every split ({len(pieces)} of {self.length} bytes in all)"
        check(len(parts[split]) > 0, f"{split}_fraction", (self.val_fraction, self.test_fraction), allowed)
        return NamedTensorRows(input_ids=parts[split].long())


def _text() -> Tensor:
    """Returns all topics in alphabetical order, as bytes `[N]` uint8."""
    from pydoc_data.topics import topics  # here: it is half a megabyte

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
