"""Which kernel runs an operator on a device, and why: automatic, visible, and possible to force.

The choice is `reference` (plain torch, the oracle), `numba` (CPU) or `triton` (CUDA, or CPU under
`TRITON_INTERPRET=1`). The environment variable `LIGHTNING_N2UQ_KERNELS` (auto, reference, numba, triton)
or `force` overrides it. A forced kernel that cannot run raises: a user's choice is never skipped silently.
"""

import functools
import importlib.util
import os
from types import TracebackType
from typing import Literal, NamedTuple, cast

import torch

Kernel = Literal["reference", "numba", "triton"]

ENVIRONMENT_VARIABLE = "LIGHTNING_N2UQ_KERNELS"
CHOICES = ("auto", "reference", "numba", "triton")

_OPS: dict[str, tuple[str, ...]] = {
    "threshold_quantize": ("reference", "numba", "triton"),
    "quantize_weight": ("reference", "numba", "triton"),
    "packed_activation": ("reference", "numba", "triton"),
    "residual_block": ("reference", "numba", "triton"),
    "stem": ("reference", "numba", "triton"),
    "nuq": ("reference", "numba", "triton"),
}
_forced: str | None = None


class KernelChoice(NamedTuple):
    """One line of `report`: the kernel of an operator on a kind of device, and the reason for it."""

    op: str
    device: str
    kernel: Kernel
    reason: str


class _Forced:
    """Restores the previous choice when used as a context manager."""

    def __init__(self, previous: str | None) -> None:
        self._previous = previous

    def __enter__(self) -> "_Forced":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def register_op(op: str, kernels: tuple[str, ...]) -> None:
    """Declares the kernels an operator has besides the oracle.

    Args:
        op: Name of the operator, as given to `kernel_for`.
        kernels: Any of `numba` and `triton`; `reference` is implied.
    """
    for kernel in kernels:
        _check(kernel, "kernels")
    _OPS[op] = ("reference", *(kernel for kernel in kernels if kernel != "reference"))


def force(kernels: str | None) -> _Forced:
    """Forces one kind of kernel for every operator, over the environment variable.

    Takes effect at once; as a context manager (`with force("reference"):`) it is undone at the end.

    Args:
        kernels: `auto`, `reference`, `numba`, `triton`, or None to follow the environment again.

    Raises:
        ValueError: If `kernels` is none of these.
    """
    global _forced
    if kernels is not None:
        _check(kernels, "kernels")
    previous, _forced = _forced, kernels
    return _Forced(previous)


def kernel_for(op: str, device: torch.device) -> Kernel:
    """The kernel that runs `op` on `device`.

    Raises:
        ValueError: If the environment variable has an unknown value, or a forced kernel cannot run there.
    """
    return _choose(op, device.type)[0]


def reason_for(op: str, device: torch.device) -> str:
    """Why `kernel_for` answers what it does, in one short sentence."""
    return _choose(op, device.type)[1]


def report() -> list[KernelChoice]:
    """The choice for every known operator on every kind of device this process can use."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_report_line(op, device) for op in sorted(_OPS) for device in devices]


def _report_line(op: str, device_type: str) -> KernelChoice:
    try:
        kernel, reason = _choose(op, device_type)
    except ValueError as error:
        return KernelChoice(op, device_type, "reference", f"unusable choice: {error}")
    return KernelChoice(op, device_type, kernel, reason)


def _choose(op: str, device_type: str) -> tuple[Kernel, str]:
    available = _OPS.get(op, ("reference", "numba", "triton"))
    return _choose_from(available, op, device_type, *_wanted(), os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _choose_from(
    available: tuple[str, ...], op: str, device_type: str, wanted: str, source: str, interpreted: bool
) -> tuple[Kernel, str]:
    if wanted == "auto":
        return _automatic(available, device_type, interpreted)
    if wanted not in available:
        return "reference", f"{source} asks for {wanted}, but {op} has no such kernel"
    obstacle = _obstacle(wanted, device_type, interpreted)
    if obstacle:
        raise ValueError(f"{source}={wanted!r} cannot run {op} on {device_type}: {obstacle}.")
    return cast("Kernel", wanted), f"forced by {source}"


def _wanted() -> tuple[str, str]:
    if _forced is not None:
        return _forced, "force()"
    value = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    _check(value, ENVIRONMENT_VARIABLE)
    return value, ENVIRONMENT_VARIABLE


def _automatic(available: tuple[str, ...], device_type: str, interpreted: bool) -> tuple[Kernel, str]:
    preferred = {"cpu": "numba", "cuda": "triton"}.get(device_type)
    if preferred is None:
        return "reference", f"no fast kernels for {device_type} devices"
    if preferred not in available:
        return "reference", f"the operator has no {preferred} kernel"
    obstacle = _obstacle(preferred, device_type, interpreted)
    if obstacle:
        return "reference", obstacle
    return cast("Kernel", preferred), f"fastest on {device_type}"


def _obstacle(kernel: str, device_type: str, interpreted: bool) -> str | None:
    """What keeps a kernel from running on a kind of device, or None."""
    if kernel == "reference":
        return None
    if not _installed(kernel):
        return f"{kernel} is not installed"
    if kernel == "numba":
        return None if device_type == "cpu" else "numba kernels run on cpu only"
    if device_type == "cuda" or interpreted:
        return None
    return "triton kernels need a cuda device (or TRITON_INTERPRET=1)"


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check(value: str, name: str) -> None:
    if value not in CHOICES:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES)}, got {value!r}.")
