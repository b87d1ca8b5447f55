"""Quantize any LightningModule by a policy, in a training run, from a config or from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from lightning_n2uq.callbacks._quantize import building
from lightning_n2uq.callbacks._quantize.optimizer_groups import separate_quantizers
from lightning_n2uq.callbacks._quantize.order import check_place
from lightning_n2uq.checkpointing.reading import RefusedCheckpointError, read_file
from lightning_n2uq.convert.first_batches import FirstBatches
from lightning_n2uq.convert.loading import convert_when_loading
from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.record import KEY, Record, quantize, record_of, restore
from lightning_n2uq.utils.compat_lightning import checkpoint_file, checkpoint_to_come, hands_weights_back
from lightning_n2uq.utils.validation import check, check_integer, check_number

convert_when_loading()


class QuantizeModel(Callback):
    """Quantizes the layers of any LightningModule by a policy, trains and restores them.

    The network is converted before optimizers are built, also where `configure_model` builds it. Input
    ranges are fitted to the first training batches, each of which runs through the float network first; a
    resumed run does not fit them again. Checkpoints hold the policy and every layer's methods and bits: in
    `fit`, `validate`, `test`, `predict` and `load_from_checkpoint` a fresh module is converted by them.

    Callbacks that copy the module or look for quantized layers come behind this one.

    Args:
        policy: The fields of `lightning_n2uq.convert.Policy` (`weight_bits`, `rules`, `modules`, `exclude`,
            ...), or the path of a YAML file that holds them. None takes the checkpoint's, else the defaults.
        calibration_batches: How many of the first training batches input ranges are fitted to; 0 leaves each
            quantizer to its own first batch, after the quantizers before it.
        quantizer_lr_multiplier: The factor on the learning rate of quantizer parameters, which then have
            optimizer groups of their own without weight decay; None leaves the groups as they are.
        input_shape: The shape of an input, batch first, with which the network is run once to find its first
            and last layers; None takes the module's `example_input_array`, else the order of registration.

    Raises:
        ValueError: A value is impossible; the message names the argument, the value and what is allowed.
    """

    def __init__(
        self,
        policy: dict[str, Any] | str | None = None,
        calibration_batches: int = 1,
        quantizer_lr_multiplier: float | None = 0.1,
        input_shape: Sequence[int] | None = None,
    ) -> None:
        self.policy = None if policy is None else Policy.from_mapping(_mapping(policy))
        self.calibration_batches = check_integer("calibration_batches", calibration_batches, 0)
        if quantizer_lr_multiplier is not None:
            check_number("quantizer_lr_multiplier", quantizer_lr_multiplier, 0)
        self.quantizer_lr_multiplier = quantizer_lr_multiplier
        self.input_shape = (
            None if input_shape is None else [check_integer("input_shape", n, 1) for n in input_shape]
        )
        self.record: Record | None = None
        self._first: FirstBatches | None = None
        self._eager: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Converts the network, unless it is converted already."""
        check_place(self, trainer)
        if (known := record_of(pl_module)) is not None:
            self._check_same(known.policy, f"{type(pl_module).__name__} is quantized by")
            self.record = known
            building.skip_building(pl_module)
        else:
            if not building.shards(trainer):
                building.build_now(trainer, pl_module)
            self._convert(trainer, pl_module)
            if stage == "fit" and hands_weights_back(trainer):
                rank_zero_warn(
                    "QuantizeModel: the module of the process that called fit stays without quantizers where "
                    "ranks are spawned or forked; load a checkpoint of the run, use strategy ddp, or call "
                    "lightning_n2uq.quantize(module, policy) before fit"
                )
        if stage == "fit" and self.quantizer_lr_multiplier is not None:
            separate_quantizers(pl_module, self.quantizer_lr_multiplier)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses the checkpoint of a module quantized otherwise: its weights may fit all the same."""
        if KEY not in checkpoint or self.record is None:
            return
        saved = Record.from_mapping(checkpoint[KEY], "ckpt_path")
        before, now = ({**record.layers, **record.products} for record in (saved, self.record))
        differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"ckpt_path: got a checkpoint with {name} {_shown(before.get(name))}, allowed is "
                f"{_shown(now.get(name))}, as the policy says ({len(differing)} layers differ)"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepares to fit input ranges in a run that starts."""
        if self.calibration_batches and trainer.ckpt_path is None:
            self._first = FirstBatches(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Keeps a compiled network from being compiled before its ranges are known."""
        if self._first is not None:
            self._first.next_batch()
            self._eager = self._eager or torch.compiler.set_stance("force_eager")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Ends the fitting of ranges after its last batch."""
        if self._first is not None and batch_idx + 1 >= self.calibration_batches:
            self._end_fitting(report=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the module without hooks: Lightning calls no teardown after an error."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes off whatever was put on for this run."""
        self._end_fitting()
        building.build_again(pl_module)

    def _convert(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved = _saved_record(trainer, needed=self.policy is None)
        if saved is not None and (self.policy is None or self.policy.to_mapping() == saved.policy):
            restore(pl_module, saved, "ckpt_path")
            number = len(saved.layers) + len(saved.products)
            rank_zero_info(f"QuantizeModel: {number} layers by the policy in the checkpoint")
        else:
            example = None if self.input_shape is None else torch.zeros(self.input_shape)
            report = quantize(pl_module, self.policy, example=example)
            rank_zero_info(f"QuantizeModel: {type(pl_module).__name__} by the policy:\n{report}")
        self.record = record_of(pl_module)

    def _check_same(self, policy: dict[str, Any], where: str) -> None:
        if self.policy is None or (own := self.policy.to_mapping()) == policy:
            return
        key = next(key for key in own if own[key] != policy.get(key))
        raise ValueError(
            f"policy.{key}: got {own[key]!r}, allowed is {policy.get(key)!r}: {where} another policy"
        )

    def _end_fitting(self, report: bool = False) -> None:
        if self._eager is not None:
            torch.compiler.set_stance("default")
            self._eager = None
        if self._first is None:
            return
        first, self._first = self._first, None
        first.close()
        if report:
            rank_zero_info(
                f"QuantizeModel: {first.ranges} input ranges fitted to {self.calibration_batches} batches"
            )
            if first.unreached:
                rank_zero_warn(
                    f"QuantizeModel: {', '.join(first.unreached)}: no batch ran through; such a quantizer "
                    "takes its range from the first one that does"
                )


def _mapping(policy: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(policy, str):
        return policy
    if not Path(policy).is_file():
        raise ValueError(f"policy: no such file {policy!r}")
    values = yaml.safe_load(Path(policy).read_text(encoding="utf-8"))
    check(isinstance(values, dict), "policy", type(values).__name__, f"is a mapping of keys in {policy!r}")
    return dict(values)


def _saved_record(trainer: Trainer, needed: bool) -> Record | None:
    """Returns the record in the checkpoint that the run begins with, None without one.

    A file with more than tensors and plain values, which the Trainer may be told to trust, is not read here;
    that is an error only where the record is `needed`.
    """
    path = checkpoint_to_come(trainer)
    if path is None or not Path(checkpoint_file(path)).is_file():
        return None
    try:
        checkpoint = read_file(checkpoint_file(path), "ckpt_path", mmap=True)
    except RefusedCheckpointError:
        if needed:
            raise
        return None
    values = checkpoint.get(KEY) if isinstance(checkpoint, dict) else None
    return None if values is None else Record.from_mapping(values, "ckpt_path")


def _shown(spec: dict[str, Any] | None) -> str:
    if spec is None:
        return "in floats"
    if "quantizer" in spec:
        return "{quantizer} {bits}".format(**spec)
    return "{weight_quantizer} {weight_bits} / {activation_quantizer} {activation_bits}".format(**spec)
