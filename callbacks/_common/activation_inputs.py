"""Samples of what the activation quantizers of chosen layers get, for one step at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_n2uq.callbacks._common.quantized_layers import QuantizedLayer


class ActivationInputs:
    """Samples of the inputs of quantized layers, collected by hooks that exist only while watching.

    The hooks are on the layers, not on their quantizers: a layer may fuse its quantizer into something that
    never calls it. A layer that runs several times in a step keeps the sample of its last call.

    Args:
        max_samples: The largest number of values kept per layer; more are thinned out evenly.
        keep_graph: Whether the samples stay part of the autograd graph.

    Attributes:
        shapes: Shapes of the inputs of the layers that have run, by name.
    """

    def __init__(self, max_samples: int, keep_graph: bool = False) -> None:
        self.max_samples = max_samples
        self.keep_graph = keep_graph
        self.shapes: dict[str, torch.Size] = {}
        self._hooks: list[RemovableHandle] = []
        self._samples: dict[str, tuple[QuantizedLayer, Tensor]] = {}

    def watch(self, layers: Iterable[QuantizedLayer]) -> None:
        """Begins to collect the inputs of those layers that quantize them; a second call does nothing."""
        if self._hooks:
            return
        for layer in layers:
            if layer.activation_quantizer is not None:
                self._hooks.append(
                    layer.module.register_forward_pre_hook(self._keeper(layer), with_kwargs=True)
                )

    def items(self) -> list[tuple[QuantizedLayer, Tensor]]:
        """Returns the layers that ran and what their quantizers got, 1-D, dtype and device of the input."""
        found = [(layer, layer.quantizer_input(x)) for layer, x in self._samples.values()]
        return found if self.keep_graph else [(layer, x.detach()) for layer, x in found]

    def uncalled(self, layers: Iterable[QuantizedLayer]) -> list[str]:
        """Returns the names of watched layers that did not run, but for those in evaluation mode."""
        watched = [layer for layer in layers if layer.activation_quantizer is not None]
        return [one.name for one in watched if one.module.training and one.name not in self._samples]

    def clear(self) -> None:
        """Forgets the samples."""
        self._samples.clear()

    def close(self) -> None:
        """Forgets the samples and stops collecting."""
        self.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _keeper(self, layer: QuantizedLayer) -> Any:  # noqa: ANN401 -- torch's hook type
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
            if module.training and given is not None:
                x = given if self.keep_graph else given.detach()
                self.shapes[layer.name] = x.shape
                self._samples[layer.name] = (layer, thin(x, self.max_samples))

        return keep


def thin(x: Tensor, max_samples: int) -> Tensor:
    """Returns at most `max_samples` evenly spaced values of `x`, 1-D; all of them where they fit.

    The spacing is odd, so that it does not fall into step with images' even sizes.
    """
    flat = x.reshape(-1)
    stride = -(-flat.numel() // max_samples)
    return flat if stride <= 1 else flat[:: stride + 1 - stride % 2]
