"""What `n2uq sensitivity` scores: a network, its data, its loss and the policy that names the layers."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_n2uq.backbones.by_policy import full_policy
from lightning_n2uq.callbacks import QuantizeModel
from lightning_n2uq.cli.arguments import SPECIAL_CHECKPOINTS
from lightning_n2uq.cli.building import Built, load_weights
from lightning_n2uq.cli.devices import device_of
from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.widths import widths
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.utils.compat import tree_map
from lightning_n2uq.utils.validation import check


class Subject:
    """A config's network with its weights loaded, and how to run it.

    Attributes:
        built: What the config names.
        network: The part to score: a classifier's backbone, or the whole module.
        policy: Which layers are quantized, and by which methods.
        example: An input that tells first and last layers, or None.
        loss: The loss of `(output, batch)`; None where the module has none that can be run on its own.
        forward: How to run a batch; None where the network takes its first entry.
        quantizing: The config's `QuantizeModel`, if there is one.

    Args:
        built: What the config names.
        options: The command's options.
    """

    def __init__(self, built: Built, options: argparse.Namespace) -> None:
        self.built = built
        self._data_ready = False
        module = built.model
        self.quantizing = next((c for c in built.callbacks if isinstance(c, QuantizeModel)), None)
        module.configure_model()
        self._load(module, built.config.get("ckpt_path"))
        module.to(device_of(options.device))
        self.network: nn.Module = module
        self.example: Any = None
        self.forward: Callable[[Any], object] | None = None
        self.loss: Callable[[Any, Any], Tensor] | None = None
        if isinstance(module, QuantizedClassifier):
            hp: Any = module.hparams
            self.network, self.loss = module.backbone, _cross_entropy
            policy = full_policy(hp.backbone, (hp.backbone_args or {}).get("policy"), hp)
        else:
            policy = Policy() if self.quantizing is None else self.quantizing.policy or Policy()
            shape = None if self.quantizing is None else self.quantizing.input_shape
            self.example = None if shape is None else torch.zeros(shape, device=module.device)
            self._take_loss(module)
        self.policy = _with_methods(policy, options)

    def batches(self, count: int, device: str) -> Iterator[Any]:
        """Yields the first batches of the run's training data, on the device."""
        source: Any = self.built.data
        if not self._data_ready:
            source.prepare_data()
            source.setup("fit")
            self._data_ready = True
        to = torch.device(device)
        for batch in islice(source.train_dataloader(), count):
            moved = tree_map(lambda x: x.to(to) if isinstance(x, Tensor) else x, batch)
            yield source.on_after_batch_transfer(moved, 0)

    def _load(self, module: LightningModule, path: str | None) -> None:
        if path is None:
            source = module.hparams.get("init_from")
            if source is not None and isinstance(module, QuantizedClassifier):
                print(module._load_initial_weights(source))
            else:
                warnings.warn("n2uq sensitivity: no --ckpt_path, so the weights are untrained", stacklevel=2)
            return
        check(path not in SPECIAL_CHECKPOINTS, "ckpt_path", path, "is the path of a file")
        load_weights(module, str(path), "ckpt_path")

    def _take_loss(self, module: LightningModule) -> None:
        """Takes `training_step` for the loss, and for the forward pass of a module that has no other."""
        step = _quiet_step(module)
        (batch,) = self.batches(1, str(module.device))
        module.eval()  # as in trials: a detector has no loss in this mode
        try:
            with torch.no_grad():
                float(step(batch))
        except Exception as error:  # whatever a step needs of a trainer or of two optimizers
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"loss: none, since training_step cannot be run on its own ({reason})")
            return
        if is_overridden("forward", module):
            self.loss = lambda output, batch: step(batch)
        else:
            self.forward, self.loss = step, lambda output, batch: output


def _quiet_step(module: LightningModule) -> Callable[[Any], Tensor]:
    def step(batch: Any) -> Tensor:  # noqa: ANN401
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer to log to
            result = module.training_step(batch, 0)
        loss = result["loss"] if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise TypeError(f"it returns {type(loss).__name__}")
        return loss

    return step


def _cross_entropy(output: Tensor, batch: Any) -> Tensor:  # noqa: ANN401
    return F.cross_entropy(output, batch[1])


def _with_methods(policy: Policy, options: argparse.Namespace) -> Policy:
    """Returns the policy with the methods that are asked for; full precision stands for the default."""
    values = policy.to_mapping()
    names = ("weight_quantizer", "activation_quantizer")
    if all(values[name] == "float" for name in names):
        values |= dict.fromkeys(names, "n2uq")
    values |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    smallest = widths(options.bits)[0]
    for name, size, bits in zip(names, ("weight_bits", "activation_bits"), smallest, strict=True):
        values[size] = 32 if values[name] == "float" else bits
    return Policy.from_mapping(values)
