"""Tells looks at a classifier from training and evaluation, which are forward passes too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_n2uq.quantizers.base import DataInitializedQuantizer
from lightning_n2uq.quantizers.looks import is_traced


class FirstLook:
    """Asked in every forward pass of plain modules; costs nothing once all quantizers are fitted."""

    def __init__(self) -> None:
        self._all_fitted = False

    def is_look(self, network: nn.Module, images: Tensor, example: object) -> bool:
        """Returns whether a forward pass is a look, which fits no quantizer (see `quantizers.looks`).

        That is one of the example input, and one of constant images outside of a data-parallel group (whose
        ranks fit their quantizers together).
        """
        if images is example:
            return True
        if self._all_fitted or torch.compiler.is_compiling() or images.is_meta or is_traced():
            return False
        self._all_fitted = all(m.fitted for m in network.modules() if isinstance(m, DataInitializedQuantizer))
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        return not self._all_fitted and alone and bool(images.amin() == images.amax())
