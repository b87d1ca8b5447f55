"""Gives quantizer parameters groups of their own in whatever optimizers a module configures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_n2uq.quantizers import quantizer_parameters


def separate_quantizers(pl_module: LightningModule, multiplier: float) -> None:
    """Has the module's next `configure_optimizers` put quantizer parameters into groups of their own.

    A group that a new optimizer gets is split as it arrives, before schedulers count the groups. Where that
    does not fit (schedulers with a list entry per group), the optimizers stay as the module builds them, and
    a warning says so.

    Args:
        pl_module: The module, whose layers are quantized.
        multiplier: The factor on the group's learning rate; such a group has no weight decay.
    """
    original = pl_module.configure_optimizers

    @functools.wraps(original)
    def configure() -> Any:  # noqa: ANN401 -- whatever the module returns
        pl_module.__dict__.pop("configure_optimizers", None)
        quantizers = {parameter for _, parameter in quantizer_parameters(pl_module)}
        try:
            with _splitting(quantizers, multiplier) as made:
                result = original()
        except Exception as error:
            result = original()  # an error of the module's own comes again
            reason = f" ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        else:
            reason = ""
        _report(quantizers, made, multiplier, reason)
        return result

    pl_module.configure_optimizers = configure  # type: ignore[method-assign]


@contextmanager
def _splitting(quantizers: set[nn.Parameter], multiplier: float) -> Iterator[list[Optimizer]]:
    """Splits the groups that optimizers get meanwhile; gives the optimizers."""
    plain: Callable[..., None] = Optimizer.add_param_group
    made: list[Optimizer] = []

    def add(self: Optimizer, group: dict[str, Any]) -> None:
        if self not in made:
            made.append(self)
        ours, others = _parts(group, quantizers)
        if not ours or not others:
            plain(self, group)
            return
        plain(self, {**group, "params": others})
        rate = group.get("lr", self.defaults.get("lr"))
        own = {**group, "params": ours, "weight_decay": 0.0}
        if rate is not None:
            own["lr"] = rate * multiplier
        if "weight_decay" not in self.defaults:
            del own["weight_decay"]
        if "name" in group:
            own["name"] = f"{group['name']}/quantizer"
        plain(self, own)

    Optimizer.add_param_group = add  # type: ignore[method-assign,assignment]
    try:
        yield made
    finally:
        Optimizer.add_param_group = plain  # type: ignore[method-assign]


def _parts(group: dict[str, Any], quantizers: set[nn.Parameter]) -> tuple[list[Any], list[Any]]:
    """Returns the entries of a group that are quantizers' and the others; named ones are pairs."""
    given = group["params"]
    group["params"] = entries = [given] if isinstance(given, nn.Parameter) else list(given)
    ours: list[Any] = []
    others: list[Any] = []
    for entry in entries:
        parameter = entry[1] if isinstance(entry, tuple) else entry
        (ours if parameter in quantizers else others).append(entry)
    return ours, others


def _report(quantizers: set[nn.Parameter], made: list[Optimizer], multiplier: float, reason: str) -> None:
    groups = [group["params"] for optimizer in made for group in optimizer.param_groups]
    mixed = any(
        any(p in quantizers for p in group) and any(p not in quantizers for p in group) for group in groups
    )
    held = sum(p in quantizers for group in groups for p in group)
    if reason or mixed:
        rank_zero_warn(
            "QuantizeModel: quantizer parameters share the optimizer groups of configure_optimizers, which "
            f"allows no group more{reason}; quantizer_lr_multiplier and no weight decay have no effect"
        )
    elif held:
        rank_zero_info(
            f"QuantizeModel: {held} quantizer parameters learn at {multiplier:g} of their group's rate"
        )
    if not reason and held < len(quantizers):
        rank_zero_warn(
            f"QuantizeModel: {len(quantizers) - held} of {len(quantizers)} quantizer parameters are in no "
            "optimizer that configure_optimizers has built"
        )
