"""Which of the exchange's settings mean something in sharded training; the others are refused."""

from __future__ import annotations

from dataclasses import fields

from lightning_n2uq.distributed.config import ExchangeConfig
from lightning_n2uq.utils.validation import check

_DEFAULTS = {field.name: field.default for field in fields(ExchangeConfig)}
_OF_DDP = {
    "coding": "'packed': FSDP2's collectives are of a fixed size",
    "error_feedback": "false: every rank would keep residuals of the whole model",
    "hierarchical": "false: use hsdp (in plain PyTorch, attach with replicas)",
    "ranks_per_node": "null: hsdp has shard_size",
    "unit_numel": f"{_DEFAULTS['unit_numel']}: FSDP2 decides what is sent at once",
}
_OF_REPLICAS = ("scheme", "second_phase_bits")


def check_settings(config: ExchangeConfig, param_bits: int | None, replicas: bool | None = None) -> None:
    """Raises ValueError for a setting that would have no effect, or not work.

    Args:
        config: The settings.
        param_bits: The bits of gathered parameters.
        replicas: Whether gradients are averaged between replicas; None where that is not known yet.
    """
    for name, allowed in _OF_DDP.items():
        value = getattr(config, name)
        check(value == _DEFAULTS[name], name, value, f"in sharded training is {allowed}")
    fixed = config.method not in ("alq", "amq")
    check(fixed, "method", config.method, "in sharded training are those whose levels do not adapt")
    check(param_bits in (None, 8), "param_bits", param_bits, "is 8, or null for full precision")
    if replicas is False:
        for name in _OF_REPLICAS:
            value = getattr(config, name)
            check(value == _DEFAULTS[name], name, value, "in sharded training with hsdp only")
