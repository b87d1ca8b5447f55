"""Calls of custom operators that pass by torch's dispatcher where nobody looks on.

A custom operator in Python costs a tenth of a millisecond and more per call, whatever it computes: the
dispatcher calls back into Python several times, and a network has hundreds of such calls per step. Compilers
and tracers need the operator; plain eager execution does not, and calls the function behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_n2uq.utils.compat import dispatch_modes, operator_function, operator_name, tracing_state

Function = Callable[..., Any]

_PLAIN = (Tensor, torch.nn.Parameter)


def watched(inputs: tuple[Any, ...]) -> bool:
    """Returns whether a compiler, a tracer, a mode or a subclass of tensors has to see the operator."""
    return (
        torch.compiler.is_compiling()
        or dispatch_modes() > 0
        or tracing_state() is not None
        or not all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor))
    )


def undispatched(op: Any) -> Function:  # noqa: ANN401  # CustomOpDef is not public
    """Returns the operator as a function that passes by the dispatcher where it may; no gradients."""
    function = operator_function(op)

    def call(*inputs: Any) -> Any:  # noqa: ANN401  # whatever the operator returns
        return op(*inputs) if watched(inputs) else function(*inputs)

    return call


def differentiable(op: Any, setup_context: Function, backward: Function) -> Function:  # noqa: ANN401
    """`undispatched` for an operator with a gradient, which is registered here; first order only.

    Args:
        op: A custom operator.
        setup_context: As for `register_autograd`; called as `(ctx, inputs, output)`.
        backward: As for `register_autograd`; called as `(ctx, *gradients)`. Gradients of outputs that have
            none may be None.
    """
    op.register_autograd(backward, setup_context=setup_context)
    function = operator_function(op)

    def forward(ctx: Any, *inputs: Any) -> Any:  # noqa: ANN401
        ctx.set_materialize_grads(False)
        output = function(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def first_order(ctx: Any, *grads: Tensor | None) -> Any:  # noqa: ANN401
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(first_order))}
    direct: Any = type(operator_name(op), (torch.autograd.Function,), methods)  # what profilers show

    def call(*inputs: Any) -> Any:  # noqa: ANN401
        return op(*inputs) if watched(inputs) else direct.apply(*inputs)

    return call
