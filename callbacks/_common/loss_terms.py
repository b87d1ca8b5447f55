"""Terms that are added to the loss of any LightningModule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

Term = Callable[[], "Tensor | None"]


class LossTermHandle:
    """Removes a term again."""

    def __init__(self, pl_module: LightningModule, key: int) -> None:
        self._pl_module = pl_module
        self._key = key

    def remove(self) -> None:
        """Removes the term, and the wrapper with the last one; a second call does nothing."""
        wrapper = self._pl_module.__dict__.get("training_step")
        terms = getattr(wrapper, "terms", {})
        terms.pop(self._key, None)
        if wrapper is not None and not terms:
            del self._pl_module.__dict__["training_step"]


def attach_loss_term(pl_module: LightningModule, term: Term) -> LossTermHandle:
    """Has `term()` added to what `training_step` returns, once per micro-batch.

    The sum is made where the loss is made: inside the forward pass of DDP, before Lightning divides by the
    number of accumulated batches and before the precision plugin scales the loss. So the term is averaged,
    accumulated and scaled exactly as the loss is, and its gradient goes through whatever exchanges or clips
    gradients. What the module logs as its loss stays without the term.

    Args:
        pl_module: A module with automatic optimization, whose `training_step` returns a tensor, a dictionary
            with `loss`, or None (a skipped batch, which gets no term).
        term: A function that returns a scalar, or None for nothing to add.

    Raises:
        ValueError: The module optimizes manually, so that its returned loss is not used.
    """
    if not pl_module.automatic_optimization:
        name = type(pl_module).__name__
        raise ValueError(f"pl_module: {name} optimizes manually, a loss term needs automatic_optimization")
    wrapper: Any = pl_module.__dict__.get("training_step")
    if not hasattr(wrapper, "terms"):
        wrapper = _wrap(pl_module.training_step)
        pl_module.training_step = wrapper  # type: ignore[method-assign]
    key = max(wrapper.terms, default=-1) + 1
    wrapper.terms[key] = term
    return LossTermHandle(pl_module, key)


def _wrap(training_step: Callable[..., Any]) -> Callable[..., Any]:
    terms: dict[int, Term] = {}

    @functools.wraps(training_step)
    def with_terms(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- passes through
        output = training_step(*args, **kwargs)
        for term in terms.values():
            value = term()
            if value is not None:
                output = _add(output, value)
        return output

    with_terms.terms = terms  # type: ignore[attr-defined]
    return with_terms


def _add(output: Any, value: Tensor) -> Any:  # noqa: ANN401 -- what training_step may return
    if output is None:
        return None
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + value.to(output["loss"].dtype)}
    return output + value.to(output.dtype)
