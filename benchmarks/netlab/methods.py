"""The methods compared: a name, and how to register it on a DDP module."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightning_n2uq import strategies
from lightning_n2uq.compression import CODECS
from lightning_n2uq.strategies import NUQSGDState, nuqsgd_hook
from lightning_n2uq.strategies.torch_hooks import half_hook, ordered_hook, powersgd_state

Register = Callable[[DistributedDataParallel], object]


def _nuqsgd(**settings: object) -> Register:
    def register(model: DistributedDataParallel) -> NUQSGDState:
        state = NUQSGDState(module=model.module, **settings)
        model.register_comm_hook(state, nuqsgd_hook)
        return state

    return register


def _fp16(model: DistributedDataParallel) -> None:
    model.register_comm_hook(dist.group.WORLD, half_hook)


def _powersgd(model: DistributedDataParallel) -> None:
    model.register_comm_hook(powersgd_state(rank=1, start=2), ordered_hook)


METHODS: dict[str, Register] = {
    "ddp": lambda model: None,
    "ddp_fp16": _fp16,
    "ddp_powersgd": _powersgd,
    "qsgd_inf": _nuqsgd(bits=4, levels="uniform", norm="linf"),
    "nuqsgd_8bit": _nuqsgd(bits=8, levels="float"),
    "nuqsgd": _nuqsgd(bits=4),
    "nuqsgd_3bit": _nuqsgd(bits=3),
    "nuqsgd_2bit": _nuqsgd(bits=2),
    "nuqsgd_huffman": _nuqsgd(bits=4, coding="huffman"),
    "nuqsgd_2bit_huffman": _nuqsgd(bits=2, coding="huffman"),
    "nuqsgd_all_gather": _nuqsgd(bits=4, scheme="all_gather"),
    **{name: _nuqsgd(**CODECS[name]) for name in CODECS if "rotated" in name},
    **{name: _nuqsgd(**CODECS[name]) for name in ("alq", "terngrad", "natural", "signsgd", "topk")},
}
"""By name; the names of strategies where there is one.

All have buckets of 1024 and, where not said otherwise, the l2 norm, so that only bits and codings differ. The
strategy `nuqsgd_3bit` has buckets of 256, 3 % more bytes; `nuqsgd_2bit` is `nuqsgd_rotated_2bit` here.
"""

LOCAL: dict[str, dict[str, object]] = {
    name: {"period": 10, **arguments} for name, arguments in strategies.local.LOCAL.items()
}
"""Settings of `LocalRounds`: the methods that exchange the change of the weights once in a period."""

NAMES = [*METHODS, *LOCAL]
"""All methods."""

BITS = {
    name: next((bits for bits in (1, 2, 3, 8) if f"{bits}bit" in name), 4)
    for name in METHODS
    if "qsgd" in name
}
"""Bits per coordinate of the packed and coded methods."""
