"""The one place that says which backend runs an operator on a device, and why.

A backend is `reference` (plain torch, the judge of the others), `numba` (CPU), `triton` (CUDA, or CPU under
`TRITON_INTERPRET=1`) or `onednn` (CPU; convolutions of integers); each is a folder of
`lightning_n2uq.ops.backends` with one module per operator, and the modules of an operator have the same
functions. The environment variable `LIGHTNING_N2UQ_KERNELS` (auto, reference, numba, triton, onednn) or
`force` overrides the automatic choice. A forced backend that cannot run raises: a user's choice is never
skipped silently.

`onednn` has one operator, the integer one, and the others none of it. Forcing `onednn` leaves the other
operators to the automatic choice; forcing another backend turns integer arithmetic off, and nothing else.

An operator selects once, in its forward pass, and hands the name of its choice on to its backward pass.
"""

import functools
import importlib
import importlib.util
import os
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Literal, NamedTuple, cast

import torch

from lightning_n2uq.utils import processor
from lightning_n2uq.utils.compat import constant_in_graphs, integer_operators

Backend = Literal["reference", "numba", "triton", "onednn"]

ENVIRONMENT_VARIABLE = "LIGHTNING_N2UQ_KERNELS"
CHOICES = ("auto", "reference", "numba", "triton", "onednn")

MODULES = {
    "threshold_quantize": "threshold",
    "quantize_weight": "weight",
    "packed_activation": "fused_activation",
    "residual_block": "residual",
    "stem": "stem",
    "nuq": "gradient_codec",
    "rotated": "rotated_codec",
    "integer": "integer",
}
"""The operators, and the module of each that every backend has (`onednn` the last one only, alone)."""

_FASTEST = {"cpu": "numba", "cuda": "triton"}
_FASTEST_OF = {"integer": {"cpu": "onednn"}, "rotated": {"cpu": "numba"}}
_forced: str | None = None


class KernelChoice(NamedTuple):
    """One line of `report`: the backend of an operator on a kind of device, and the reason for it."""

    op: str
    device: str
    kernel: Backend
    reason: str


def force(kernels: str | None) -> AbstractContextManager[object]:
    """Forces one backend for every operator, over the environment variable.

    Takes effect at once; as a context manager (`with force("reference"):`) it is undone at the end.

    Args:
        kernels: `auto`, `reference`, `numba`, `triton`, `onednn`, or None to follow the environment again.

    Raises:
        ValueError: If `kernels` is none of these.
    """
    global _forced
    if kernels is not None:
        _known(kernels, "kernels")
    undo = ExitStack()
    undo.callback(_restore, _forced)
    _forced = kernels
    return undo


def _restore(forced: str | None) -> None:
    global _forced
    _forced = forced


@constant_in_graphs
def select(op: str, device: torch.device) -> Backend:
    """Returns the backend that runs `op` on `device`; a compiled graph keeps the one it was compiled with.

    Args:
        op: One of `MODULES`.
        device: Where the operator's tensors are.

    Raises:
        ValueError: If the environment variable has an unknown value, or a forced backend cannot run there.
    """
    return _choose(op, device.type)[0]


@functools.cache
def _module(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"lightning_n2uq.ops.backends.{backend}.{MODULES[op]}")


def load(op: str, device: torch.device, backend: str = "auto") -> ModuleType:
    """Returns the module of an operator: the same functions and signatures for every backend.

    Args:
        op: One of `MODULES`.
        device: Where the operator's tensors are.
        backend: What `select` has answered; `auto` asks it here, for programs that were exported without a
            backend.
    """
    return _module(op, select(op, device) if backend == "auto" else backend)


def report() -> list[KernelChoice]:
    """Returns the choice for every operator on every kind of device that this process can use."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_report_line(op, device) for op in sorted(MODULES) for device in devices]


def _report_line(op: str, device_type: str) -> KernelChoice:
    try:
        backend, reason = _choose(op, device_type)
    except ValueError as error:
        return KernelChoice(op, device_type, "reference", f"unusable choice: {error}")
    return KernelChoice(op, device_type, backend, reason)


def _choose(op: str, device_type: str) -> tuple[Backend, str]:
    return _choose_from(op, device_type, *_wanted(), os.environ.get("TRITON_INTERPRET") == "1")


@functools.cache
def _choose_from(
    op: str, device_type: str, wanted: str, source: str, interpreted: bool
) -> tuple[Backend, str]:
    fastest = _FASTEST_OF.get(op, _FASTEST)
    if wanted == "auto" or (wanted == "onednn" and op != "integer"):
        return _automatic(fastest.get(device_type), device_type, interpreted)
    if op == "rotated" and wanted == "triton":
        return "reference", "no triton kernels of this operator"
    obstacle = _obstacle(wanted, device_type, interpreted)
    if obstacle:
        raise ValueError(f"{source}={wanted!r} cannot run {op} on {device_type}: {obstacle}.")
    if op == "integer" and wanted not in ("onednn", "reference"):
        return "reference", f"turned off by {source}={wanted}"
    return cast("Backend", wanted), f"forced by {source}"


def _wanted() -> tuple[str, str]:
    if _forced is not None:
        return _forced, "force()"
    return _known(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), ENVIRONMENT_VARIABLE), ENVIRONMENT_VARIABLE


def _automatic(preferred: str | None, device_type: str, interpreted: bool) -> tuple[Backend, str]:
    if preferred is None:
        return "reference", f"no fast kernels for {device_type} devices"
    obstacle = _obstacle(preferred, device_type, interpreted)
    if obstacle:
        return "reference", obstacle
    return cast("Backend", preferred), f"fastest on {device_type}"


def _obstacle(backend: str, device_type: str, interpreted: bool) -> str | None:
    """Returns what keeps a backend from running on a kind of device, or None."""
    if backend == "reference":
        return None
    if backend == "onednn":
        return _onednn_obstacle(device_type)
    if not _installed(backend):
        return f"{backend} is not installed"
    if backend == "numba":
        return None if device_type == "cpu" else "numba kernels run on cpu only"
    if device_type == "cuda" or interpreted:
        return None
    return "triton kernels need a cuda device (or TRITON_INTERPRET=1)"


def _onednn_obstacle(device_type: str) -> str | None:
    if device_type != "cpu":
        return "onednn kernels run on cpu only"
    if not processor.has_vectors():
        return "onednn needs an x86 processor with AVX2 or AVX-512"
    available = torch.backends.mkldnn.is_available() and integer_operators() is not None
    return None if available else "this build of torch has no integer convolutions of onednn"


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _known(value: str, name: str) -> str:
    if value not in CHOICES:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES)}, got {value!r}.")
    return value
