"""Evaluation as deployed: when a classifier's forward pass runs its integer network, and which one.

In evaluation mode on the CPU a classifier runs the network that `n2uq export` would write, through
`lightning_n2uq.export.FastNetwork`: what is validated is what is deployed, and it is faster than the float
modules. Where that is not possible the plain modules run, and `IntegerEvaluation.obstacle` says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_n2uq.ops.dispatch import select
from lightning_n2uq.ops.eager import watched
from lightning_n2uq.quantizers.base import Quantizer
from lightning_n2uq.utils.compat import has_hooks, runs_compiled

if TYPE_CHECKING:
    from lightning_n2uq.export.runtime.fast_engine import FastNetwork

CHOICES = ("auto", "off")
WATCHED = "a compiler or a tracer that looks on"
"""The obstacle of passes that count or record operations, as a summary of the model does."""


class IntegerEvaluation:
    """Keeps a network's deployed form until the network changes, and says when it can stand in for it.

    A change is another tensor or memory, an operation in place (optimizers, `load_state_dict`, swapped
    averages, `.to()`), another shape of the images or another setting of a quantizer. What is written through
    `.data` or by numpy is not seen: `forget` after that, which every evaluation loop does at its start.

    Args:
        choice: `auto`, or `off` for the plain modules always.

    Attributes:
        obstacle: Why the plain modules ran last, or nothing.
    """

    def __init__(self, choice: str = "auto") -> None:
        self.choice = choice
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> IntegerEvaluation:
        return IntegerEvaluation(self.choice)

    def __reduce__(self) -> tuple[type[IntegerEvaluation], tuple[str]]:
        return IntegerEvaluation, (self.choice,)

    def forget(self) -> None:
        """Drops the deployed form."""
        self.obstacle = ""
        self._key: tuple[Any, ...] | None = None
        self._network: FastNetwork | None = None
        self._refusal = ""
        self._held: list[Any] = []

    def describe(self) -> str:
        """Returns what ran last, in words."""
        if self.obstacle:
            return f"the plain modules ({self.obstacle})"
        return "the integer network, as deployed"

    def logits(self, backbone: nn.Module, images: Tensor) -> Tensor | None:
        """Returns the deployed network's logits, or None where the plain modules have to run.

        Gradients, if anybody asks for them, are the plain modules', which run for them in the backward pass.

        Args:
            backbone: The network, in evaluation mode.
            images: `[N, C, H, W]`.
        """
        network = self.network(backbone, images)
        if network is None:
            return None
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        if torch.is_grad_enabled() and parameters:
            logits: Tensor = _PlainGradient.apply(backbone, network, images, *parameters)
            return logits
        return network(images)

    def network(self, backbone: nn.Module, images: Tensor) -> FastNetwork | None:
        """Returns the deployed network if it can stand in for the plain modules on these images."""
        modules = list(backbone.modules())
        self.obstacle = next(self._obstacles(modules, images), "")
        if self.obstacle:
            return None
        network = self._current(backbone, modules, images)
        self.obstacle = self._refusal
        if network is not None and not torch.isfinite(images.sum()):
            self.obstacle = "images that are not finite"  # which the plain modules show in the logits
            return None
        return network

    def _obstacles(self, modules: list[nn.Module], images: Tensor) -> Iterator[str]:
        """Yields what speaks against the deployed form before it is known."""
        if self.choice == "off":
            yield "integer_evaluation off"
        if watched((images,)):
            yield WATCHED
        if images.device.type != "cpu":
            yield f"a {images.device.type} device"
        elif (kernels := select("packed_activation", images.device)) != "numba":
            yield f"{kernels} kernels"
        if images.dtype != torch.float32 or images.dim() != 4 or not images.numel():
            yield f"images of {images.dtype} {list(images.shape)}"
        if images.requires_grad and torch.is_grad_enabled():
            yield "images that require a gradient"
        if any(module.training for module in modules):
            yield "modules in training mode"
        if has_hooks(*modules):
            yield "hooks inside the network"
        if any(runs_compiled(module) for module in modules):
            yield "torch.compile"

    def _current(self, backbone: nn.Module, modules: list[nn.Module], images: Tensor) -> FastNetwork | None:
        """Returns the deployed form, made anew if something has changed; None if there is none."""
        tensors = [*backbone.parameters(), *backbone.buffers()]
        if any(x.is_inference() or x.device.type != "cpu" or watched((x,)) for x in tensors):
            self._refusal = "parameters that cannot be followed"
            return None
        key = (
            tuple(images.shape[1:]),
            *((id(x), x.data_ptr(), x._version, x.dtype) for x in tensors),
            *map(_settings, modules),
        )
        if key != self._key:
            self._key, self._held = key, [modules, tensors]  # what is held keeps its identity
            self._network, self._refusal = _deployed(backbone, tuple(images.shape[1:]), tensors)
        return self._network


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """Returns what identifies a module and, of a quantizer, its settings."""
    if not isinstance(module, Quantizer):
        return (id(module),)
    plain = (value for value in vars(module).values() if isinstance(value, int | float | str))
    return id(module), *plain


def _deployed(
    backbone: nn.Module, shape: tuple[int, ...], tensors: list[Tensor]
) -> tuple[FastNetwork | None, str]:
    """Returns the deployed form, or None and the reason."""
    # Only networks in single precision: the deployed one works in it.
    if odd := sorted({str(x.dtype) for x in tensors if x.is_floating_point()} - {"torch.float32"}):
        return None, f"parameters of {', '.join(odd)}"
    from lightning_n2uq.export.lower.trace import describe
    from lightning_n2uq.export.runtime.fast_engine import FastNetwork

    channels, height, width = shape
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            description = describe(backbone, (channels, height, width))
            if not description.quantizers():
                return None, "a network without quantized layers"
            return FastNetwork(description), ""
    except ValueError as error:
        return None, " ".join(str(error).split())


class _PlainGradient(torch.autograd.Function):
    """The deployed network's logits, with the gradient of the plain modules."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        backbone: nn.Module,
        network: FastNetwork,
        images: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.backbone = backbone
        ctx.save_for_backward(images, *parameters)
        return network(images)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        images, *parameters = ctx.saved_tensors
        modes = [(module, module.training) for module in ctx.backbone.modules()]
        ctx.backbone.eval()
        try:
            with torch.enable_grad():
                logits = ctx.backbone(images)
            gradients = torch.autograd.grad(logits, parameters, gradient, allow_unused=True)
        finally:
            for module, mode in modes:
                module.training = mode
        return None, None, None, *gradients
