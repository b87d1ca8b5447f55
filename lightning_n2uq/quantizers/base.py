"""The interface that all quantizers share."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.ops.uniform import UniformParameters
from lightning_n2uq.utils.validation import check, check_integer

MIN_BITS, MAX_BITS = 2, 8
_TOGETHER = ("forward", "grid", "weight_grid")


def check_bits(bits: int, name: str = "bits") -> int:
    """Returns `bits`, an integer from 2 to 8; anything else raises `ValueError`."""
    return check_integer(name, bits, MIN_BITS, MAX_BITS)


class Quantizer(nn.Module):
    """Maps a tensor to few levels; the common face of weight and activation quantizers.

    A subclass gives `forward(x) -> Tensor` (shape and dtype of `x`, values on the levels, gradients by its
    own straight-through rule) and `codes(x)` (the index of each value's level, `0 .. num_levels - 1`).

    Attributes:
        name: The key under which a config chooses the method.
        bits: The code width.
        num_levels: The number of levels, at most `2 ** bits`.
        tells_grid: Whether `grid` belongs to the same class as `forward`, and so speaks of it.
        tells_weight_grid: The same of `weight_grid`.
    """

    name: ClassVar[str]
    tells_grid: ClassVar[bool] = False
    tells_weight_grid: ClassVar[bool] = False

    def __init_subclass__(cls, **options: object) -> None:
        """Notes which methods belong together: a subclass may replace `forward` alone."""
        super().__init_subclass__(**options)
        home = {name: next(c for c in cls.__mro__ if name in vars(c)) for name in _TOGETHER}
        cls.tells_grid = home["grid"] is home["forward"]
        cls.tells_weight_grid = home["weight_grid"] is home["forward"]

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.num_levels = 2**bits

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, uint8, shape of `x`; no gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    @property
    def largest_level(self) -> int:
        """The largest magnitude of the integers of `weight_grid`; 0 where there are none."""
        return 0

    def grid(self, x: Tensor) -> QuantizerParameters | UniformParameters | None:
        """Returns what the fused chain needs to quantize activations as `forward` does, or None.

        Codes, output levels and gradients of the parameters follow from it. None says that the method is not
        uniform, or that it cannot be told from its parameters now.

        Args:
            x: Values as many as there are to quantize, with their dtype; their values are not read.
        """
        return None

    def weight_grid(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns a weight's levels, int8, and the step `[C_out]` that they are multiplied by, or None.

        Their product is the value of `forward`. No gradient. None says that the method is not uniform, or
        that a level would not fit.
        """
        return None

    def extra_repr(self) -> str:
        """Shows the bits in `print(model)`."""
        return f"bits={self.bits}"


class DataInitializedQuantizer(Quantizer):
    """A quantizer whose parameters take their first value from the first data it sees in training.

    `initialize(x)` is called once, at the first forward pass in training mode; with several processes the
    values are averaged, so that replicas stay equal. Before that, evaluation computes them on the fly from
    its own input and keeps nothing. The buffer `initialized` remembers it across checkpoints.
    """

    initialized: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self._pending = True  # python mirror of the buffer: no device read in the forward pass

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the first value of each parameter, by name, from the data `x`."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the parameters from `x` (any shape), averaged over processes."""
        for name, value in self.first_values(x.detach()).items():
            value = value.to(torch.float32)
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                value = value.clone()
                dist.all_reduce(value)
                value = value / dist.get_world_size()
            parameter = getattr(self, name)
            parameter.copy_(value.reshape(parameter.shape))
        self.initialized.fill_(True)
        self._pending = False

    def current(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """Returns the named parameters, initialised if this is the first data in training mode."""
        if self._pending:
            if not self.training:
                with torch.no_grad():
                    values = self.first_values(x.detach())
                return tuple(values[name] for name in names)
            self.initialize(x)
        return tuple(getattr(self, name) for name in names)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._pending = not bool(self.initialized)


class FullPrecision(nn.Module):
    """Leaves the values as they are. `bits` is 32; any other value raises `ValueError`."""

    name = "float"

    def __init__(self, bits: int = 32) -> None:
        super().__init__()
        check(bits == 32, "bits", bits, "is 32 with the quantizer 'float'")
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        return x


def quantizer_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns name and parameter of all that a quantizer in `model` learns (thresholds, scales, clips)."""
    return [
        (f"{prefix}.{name}" if prefix else name, parameter)
        for prefix, module in model.named_modules()
        if isinstance(module, Quantizer)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
