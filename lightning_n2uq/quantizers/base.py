"""The interface that all quantizers share."""

from __future__ import annotations

import warnings
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Self

from lightning_n2uq.ops.ste import floor_ste
from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.ops.uniform import UniformParameters
from lightning_n2uq.quantizers.looks import is_look, is_traced, looking
from lightning_n2uq.utils.compat_fsdp import sharded_twin
from lightning_n2uq.utils.validation import check, check_integer

MIN_BITS, MAX_BITS = 2, 8
STEP_FLOOR = 2.0**-23
"""The smallest step or clip, float32's relative precision: smaller and negative ones count as this."""

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
        positive: Names of parameters that are bounded below by `STEP_FLOOR`, since only a positive number
            makes sense; see `bounded`.
        widths_allowed: The smallest and the largest code width of the method.
        tells_grid: Whether `grid` belongs to the same class as `forward`, and so speaks of it.
        tells_weight_grid: The same of `weight_grid`.
    """

    name: ClassVar[str]
    positive: ClassVar[tuple[str, ...]] = ()
    widths_allowed: ClassVar[tuple[int, int]] = (MIN_BITS, MAX_BITS)
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
        self.bits = check_integer("bits", bits, *self.widths_allowed)
        self.num_levels = 2**bits

    def set_channels(self, channels: int) -> None:
        """Gives a weight quantizer one parameter per output channel, where its method has that; else nothing.

        Layers call it before anything is learned.
        """

    def codes(self, x: Tensor) -> Tensor:
        """Returns the level index of every value, uint8, shape of `x`; no gradient."""
        raise NotImplementedError(f"{type(self).__name__} has no codes")

    @property
    def method(self) -> Quantizer:
        """The quantizer with the method's parameters: this one, or the one that it is wrapped around."""
        return self

    def method_input(self, x: Tensor) -> Tensor:
        """Returns what `method` quantizes where this quantizer gets `x` (any shape, floating)."""
        return x

    def shift(self, x: Tensor) -> Tensor | None:
        """Returns `s` `[1]` where `forward(x)` is `method(x - s) + s`, None where it is something else."""
        return None

    @property
    def largest_level(self) -> int:
        """The largest magnitude of the integers of `weight_grid`; 0 where there are none."""
        return 0

    def bounded(self, name: str) -> Tensor:
        """Returns a parameter as the method uses it: those in `positive` are at least `STEP_FLOOR`.

        The gradient reaches the parameter unchanged, so that one at or below zero can rise again.
        """
        parameter: Tensor = getattr(self, name)
        return floor_ste(parameter, STEP_FLOOR) if name in self.positive else parameter

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

    That happens once, at the first forward pass in training mode whose values differ from each other; with
    several processes the values are averaged, so that replicas stay equal. A batch without spread (empty, all
    values equal, or not finite) puts it off with a warning, and a look at the network (see `looks`) never
    does it.
    Before that, every forward pass computes the values on the fly from its own input and keeps nothing.
    The buffer `initialized` (0 or 1; a number, so that averages of weights can take its mean) alone says
    whether it has happened, also in copies and across checkpoints.
    """

    initialized: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("initialized", torch.zeros(()))
        self._read: tuple[int, int] | None = None  # identity and version of the buffer that was read last
        self._was_fitted = False  # what it said

    @property
    def fitted(self) -> bool:
        """Whether the parameters have their first value, as the buffer says.

        In training on an accelerator the buffer is read only after it was written, so that no step waits for
        the device. While torch traces, what was read last counts; `train` and `eval` read it.
        """
        buffer = self.initialized
        if buffer.is_meta or is_traced():
            return self._was_fitted
        if torch.compiler.is_compiling():
            return self._was_fitted or bool(buffer)
        seen = None if buffer.is_inference() else (id(buffer), buffer._version)
        if seen is None or seen != self._read or buffer.is_cpu or not self.training:
            self._read, self._was_fitted = seen, bool(buffer)
        return self._was_fitted

    def first_values(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the first value of each parameter, by name, from the data `x`."""
        raise NotImplementedError

    @torch.no_grad()
    def set_first_values(self, values: dict[str, Tensor]) -> None:
        """Sets the parameters and notes that they are fitted."""
        for name, value in values.items():
            parameter = getattr(self, name)
            write_parameter(parameter, value.reshape(parameter.shape))
        self._note_fitted()

    def _note_fitted(self) -> None:
        self.initialized.fill_(1)
        self._read, self._was_fitted = None, True

    def initialize(self, x: Tensor) -> None:
        """Sets the parameters from `x` (any shape, whatever its values), averaged over processes."""
        self._fit(x, True)

    @torch.no_grad()
    def _fit(self, x: Tensor, useful: bool) -> bool:
        """Sets the parameters from the mean over processes with useful data; returns whether there is one."""
        x = x.detach()
        values = self.first_values(x if useful else torch.zeros_like(one_value_at_least(x)))
        total = _sum_over_processes(torch.tensor(float(useful), device=x.device))
        if not bool(total):
            return False
        means = {}
        for name, value in values.items():
            own = value.to(torch.promote_types(value.dtype, torch.float32))
            means[name] = _sum_over_processes(own if useful else torch.zeros_like(own)) / total
        self.set_first_values(means)
        return True

    def fits(self, x: Tensor) -> bool:
        """Returns whether the parameters are fitted, after fitting them to `x` where training asks for it."""
        if self.fitted:
            return True
        if not self.training or x.is_meta or is_look():
            return False
        if self._fit(x, _has_spread(x)):
            return True
        warnings.warn(
            f"{type(self).__name__}: the batch has no spread (no values, or all are equal or not finite), "
            "the first values of its parameters wait for one that has",
            stacklevel=2,
        )
        return False

    def asked(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """Returns the named parameters as `current` does, but fits nothing: for questions about a tensor."""
        with looking():
            return self.current(x, *names)

    def current(self, x: Tensor, *names: str) -> tuple[Tensor, ...]:
        """Returns the named parameters, bounded; fitted first if this is the first data in training mode."""
        if self.fits(x):
            return tuple(self.bounded(name) for name in names)
        with torch.no_grad():
            values = self.first_values(one_value_at_least(x.detach()))
        if not self.training:
            return tuple(values[name] for name in names)
        # Parameters stay part of the graph, with gradient 0: data-parallel training waits for each of them.
        return tuple(values[name] + 0 * getattr(self, name).reshape(values[name].shape) for name in names)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode, and reads `initialized` while it can be read: tracing cannot."""
        super().train(mode)
        _ = self.fitted
        return self

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._read = None
        _ = self.fitted


def write_parameter(parameter: Tensor, value: Tensor) -> None:
    """Writes a value into a parameter for good, also where FSDP2 has gathered or sharded it.

    Args:
        parameter: The parameter: whole, gathered for a forward pass, or a shard (`DTensor`).
        value: The whole value, in a shape that the parameter's can take; the same on all ranks.
    """
    for target in (parameter, sharded_twin(parameter)):
        if target is not None:
            mesh = getattr(target, "device_mesh", None)
            target.copy_(value if mesh is None else _shard_of(value, target))


def _shard_of(value: Tensor, target: Tensor) -> Tensor:
    """Returns this rank's shard of a value that all ranks have."""
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(target.dtype).expand(target.shape).contiguous()
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)  # type: ignore[attr-defined]


def _has_spread(x: Tensor) -> bool:
    """Returns whether values differ from each other, and all are finite."""
    if x.numel() == 0:
        return False
    low, high = torch.aminmax(x.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high) & (low < high))


def one_value_at_least(x: Tensor) -> Tensor:
    """Returns `x`, or few zeros where `x` is empty, as a rank's share of a small batch may be."""
    return x if x.numel() else x.new_zeros([max(size, 1) for size in x.shape])


def _sum_over_processes(x: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """Returns the mean of `x` over all processes; `x` itself where there is one."""
    number = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return _sum_over_processes(x) / number


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
