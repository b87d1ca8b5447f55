"""Private names of torch's FSDP2, each behind one function here and with one test in `test_compat_fsdp.py`.

As in `compat`; nothing here imports FSDP2 before a function needs it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_n2uq.utils.compat import TESTED, IncompatibleReleaseError, private

_PACKAGE = "torch.distributed.fsdp"
_FLAT_SIZES = {
    "foreach_reduce": "padded_unsharded_sizes",
    "foreach_all_gather": "param_all_gather_input_numels",
}


class InFlight(NamedTuple):
    """A parameter in the flat tensor of one of FSDP2's collectives.

    Attributes:
        module: The module that has the parameter.
        name: Its name there.
        parameter: The sharded parameter, a `DTensor`.
        numel: The coordinates that it has in one rank's part of the flat tensor, padding included.
    """

    module: nn.Module
    name: str
    parameter: Tensor
    numel: int


def parameters_in_flight() -> list[InFlight] | None:
    """Returns the parameters in the collective that FSDP2 has called the caller for, in their order.

    FSDP2 hands a custom collective flat tensors only, and leaves parameters without a gradient out of them,
    so the order is what its own function has in its variables.

    Returns:
        The parameters, or None where the caller was not called by FSDP2.
    """
    inside = [frame for frame in _callers() if frame.f_globals.get("__name__", "").startswith(_PACKAGE)]
    if not inside:
        return None
    for frame in inside:
        sizes = _FLAT_SIZES.get(frame.f_code.co_name)
        if sizes is not None and sizes in frame.f_locals and "fsdp_params" in frame.f_locals:
            world_size = int(frame.f_locals["world_size"])
            return [
                _in_flight(parameter, _numel(size, world_size))
                for parameter, size in zip(frame.f_locals["fsdp_params"], frame.f_locals[sizes], strict=True)
            ]
    raise IncompatibleReleaseError(
        f"torch: got {torch.__version__}, whose FSDP2 does not tell the parameters of a collective; allowed "
        f"is torch{TESTED['torch']}"
    )


def _in_flight(parameter: Any, numel: int) -> InFlight:  # noqa: ANN401
    info = private(parameter, "_module_info")
    return InFlight(info.module, info.param_name, parameter.sharded_param, numel)


def _numel(size: Any, world_size: int) -> int:  # noqa: ANN401
    """Returns the coordinates per rank: of a whole padded gradient's size, or of the parts of a shard."""
    return sum(size) if isinstance(size, list) else int(size.numel()) // world_size


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Lets `call` run when the backward pass that is under way has ended, FSDP2's own end included."""
    private(torch.autograd.Variable, "_execution_engine").queue_callback(call)


def sharded_twin(parameter: Tensor) -> Tensor | None:
    """Returns the sharded parameter that FSDP2 has gathered into `parameter` for the forward pass under way.

    What is written to a gathered parameter is lost when it is resharded, unless it is written there too.

    Returns:
        The `DTensor`, or None where `parameter` is an ordinary one.
    """
    if _PACKAGE not in sys.modules:
        return None
    from torch.distributed.fsdp import FSDPModule

    seen: set[int] = set()
    for frame in _callers():
        module = frame.f_locals.get("self")
        if isinstance(module, FSDPModule) and id(module) not in seen:
            seen.add(id(module))
            for candidate in _managed(module):
                if getattr(candidate, "_unsharded_param", None) is parameter:
                    twin: Tensor = candidate.sharded_param
                    return twin
    return None


def _managed(module: Any) -> Iterator[Any]:  # noqa: ANN401
    """Yields FSDP2's records of the parameters that it gathers for a module."""
    state = private(module, "_get_fsdp_state")()
    if hasattr(state, "_fsdp_param_groups"):  # torch 2.12 and newer
        groups = state._fsdp_param_groups
    else:
        groups = [group for group in [private(state, "_fsdp_param_group")] if group is not None]
    for group in groups:
        yield from group.fsdp_params


backward_number: Callable[[], int] = private(torch._C, "_current_graph_task_id")
"""Returns the number of the backward pass that this thread is in, -1 outside of one."""
