"""Splits held in memory as tensors of equal length, read a batch at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class _Rows(Dataset[Any]):
    def __init__(self, tensors: list[Tensor]) -> None:
        self.count = len(tensors[0])

    def __len__(self) -> int:
        return self.count

    def chosen(self, sample_ids: list[int]) -> Tensor:
        """Returns the rows that sample ids name."""
        return torch.tensor(sample_ids, dtype=torch.int64) % self.count


class TensorRows(_Rows):
    """A batch is a tuple of rows.

    Args:
        tensors: Tensors of equal length.
    """

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(list(tensors))
        self.tensors = tensors

    def __getitems__(self, sample_ids: list[int]) -> tuple[Tensor, ...]:
        """Returns a batch."""
        rows = self.chosen(sample_ids)
        return tuple(tensor[rows] for tensor in self.tensors)

    def __getitem__(self, sample_id: int) -> tuple[Tensor, ...]:
        """Returns one row of each."""
        return tuple(part[0] for part in self.__getitems__([sample_id]))


class NamedTensorRows(_Rows):
    """A batch is a mapping of names to rows.

    Args:
        tensors: Tensors of equal length.
    """

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__(list(tensors.values()))
        self.tensors = tensors

    def __getitems__(self, sample_ids: list[int]) -> dict[str, Tensor]:
        """Returns a batch."""
        rows = self.chosen(sample_ids)
        return {name: tensor[rows] for name, tensor in self.tensors.items()}

    def __getitem__(self, sample_id: int) -> dict[str, Tensor]:
        """Returns one row of each."""
        return {name: part[0] for name, part in self.__getitems__([sample_id]).items()}
