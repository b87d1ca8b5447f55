"""The weights on which all ranks last agreed, and the outer optimizer that moves them.

Nothing here communicates: `local_rounds` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.utils.validation import check, check_integer, check_number


@dataclass(frozen=True)
class LocalConfig:
    """Settings of training in rounds; equal on every rank, checked by the handshake.

    Args:
        period: The optimizer steps that every rank takes alone between two exchanges.
        outer_lr: The learning rate with which the mean change of the weights is applied; 1 with
            `outer_momentum=0` is local SGD, the mean of the ranks' weights.
        outer_momentum: The Nesterov momentum of the outer optimizer; DiLoCo uses 0.9 with `outer_lr=0.7`.
        save_ranks: Whether checkpoints hold what every rank has of its own (its optimizer's state and, inside
            a round, its weights), which a resumed run needs to go on to the bit; without it the file is as
            small as that of one rank, and a resumed run begins with a new round.

    Raises:
        ValueError: If a value is not allowed; the message names the argument.
    """

    period: int = 10
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    save_ranks: bool = True

    def __post_init__(self) -> None:
        check_integer("period", self.period, 1)
        check_number("outer_lr", self.outer_lr, 0.0, above=True)
        check_number("outer_momentum", self.outer_momentum, 0.0, 1.0, below=True)

    @property
    def averages(self) -> bool:
        """Whether the outer optimizer does no more than average."""
        return self.outer_lr == 1.0 and self.outer_momentum == 0.0

    def facts(self) -> dict[str, Any]:
        """Returns what the handshake compares, under the names users set."""
        return {name: getattr(self, name) for name in ("period", "outer_lr", "outer_momentum")}


class AgreedWeights:
    """The trained parameters as all ranks last agreed on them, and the outer optimizer's momentum.

    They are kept in fp32 at least: in bfloat16 small changes of an outer step would be lost.

    Douillard et al., "DiLoCo", 2023, arXiv 2311.08105, algorithm 1; with `outer_lr=1` and no momentum local
    SGD (Stich, ICLR 2019, arXiv 1805.09767).

    Args:
        config: The settings of the outer optimizer.
    """

    def __init__(self, config: LocalConfig) -> None:
        self._config = config
        self._parameters: dict[str, nn.Parameter] = {}
        self._agreed: dict[str, Tensor] = {}
        self._momentum: dict[str, Tensor] = {}
        self._flat = torch.empty(0)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that travel, in the order of `change`."""
        return list(self._parameters.values())

    def unknown(self, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Returns those of `trained` that are not followed yet: new ones, unfrozen or replaced ones."""
        return {name: p for name, p in trained.items() if self._parameters.get(name) is not p}

    def follow(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Takes the present values of `parameters`, equal on all ranks, as agreed.

        Raises:
            ValueError: If a parameter is not of real numbers.
        """
        for name, parameter in parameters.items():
            check(parameter.is_floating_point(), name, str(parameter.dtype), "are real floating dtypes")
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self._parameters[name] = parameter
            self._agreed[name] = parameter.detach().to(wide, copy=True)
            self._momentum.pop(name, None)

    def forget_all_but(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Stops following what is not trained any more."""
        for name in self._parameters.keys() - trained.keys():
            del self._parameters[name], self._agreed[name]
            self._momentum.pop(name, None)

    def _pieces(self, flat: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yields every parameter with its part of a flat tensor."""
        start = 0
        for name, parameter in self._parameters.items():
            yield name, parameter, flat[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()

    @torch.no_grad()
    def change(self) -> Tensor:
        """Returns the agreed weights minus this rank's: fp32, flat, the same buffer every time."""
        numel = sum(parameter.numel() for parameter in self._parameters.values())
        device = next(iter(self._parameters.values())).device if numel else self._flat.device
        if self._flat.numel() != numel or self._flat.device != device:
            self._flat = torch.empty(numel, device=device)
        for name, parameter, piece in self._pieces(self._flat):
            start = self._agreed[name].to(parameter.dtype)  # where this round began
            if parameter.dtype == torch.float32:
                torch.sub(start, parameter, out=piece)
            else:
                piece.copy_(start.to(self._agreed[name].dtype) - parameter)
        return self._flat

    @torch.no_grad()
    def advance(self, mean: Tensor) -> None:
        """Takes an outer step along the mean change, and gives its result to the parameters.

        Args:
            mean: The mean of all ranks' `change`, the same bits on every rank.
        """
        rate, momentum = self._config.outer_lr, self._config.outer_momentum
        for name, parameter, piece in self._pieces(mean):
            step = piece
            if momentum:
                velocity = self._momentum.setdefault(name, torch.zeros_like(piece))
                velocity.mul_(momentum).add_(piece)
                step = piece.add(velocity, alpha=momentum)
            parameter.copy_(self._agreed[name].sub_(step, alpha=rate))

    @torch.no_grad()
    def give(self) -> None:
        """Gives the agreed values to the parameters."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._agreed[name])

    def own(self) -> dict[str, Tensor]:
        """Returns copies of this rank's weights."""
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def take(self, own: Mapping[str, Tensor]) -> None:
        """Gives this rank's weights, as `own` returned them, to the parameters."""
        for name, parameter in self._parameters.items():
            if name in own:
                parameter.copy_(own[name])

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Returns the momentum, and those agreed values that a model's own state cannot hold."""
        wide = {
            name: agreed.to("cpu", copy=True)
            for name, agreed in self._agreed.items()
            if agreed.dtype != self._parameters[name].dtype
        }
        momentum = {name: velocity.to("cpu", copy=True) for name, velocity in self._momentum.items()}
        return {"agreed": wide, "momentum": momentum}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Continues from `state_dict`, once the parameters have the values that were agreed on."""
        for kept, saved in ((self._agreed, state["agreed"]), (self._momentum, state["momentum"])):
            for name, value in saved.items():
                if name in self._parameters and self._parameters[name].shape == value.shape:
                    kept[name] = value.to(self._parameters[name].device, copy=True)
