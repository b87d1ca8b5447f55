"""A LightningModule whose example input has the type and the device of its parameters."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_n2uq.utils.compat import require, tree_map

require(nn.Module, "_apply")


class ModuleWithExampleInput(LightningModule):
    """Keeps `example_input_array` fit for the network: the Trainer's model summary runs one on the other.

    Lightning converts parameters for `bf16-true`, `16-true` and `64-true`, and leaves the example as it is.
    """

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        converted = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        example: Any = self.example_input_array
        if example is not None:
            self.example_input_array = tree_map(lambda x: fn(x) if isinstance(x, Tensor) else x, example)
        return converted
