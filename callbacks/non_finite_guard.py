"""A guard against NaN, inf and collapsed quantizers: it names them, and stops, skips or warns."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_n2uq.callbacks._guard import checks
from lightning_n2uq.callbacks._guard.broken_layer import first_broken_output
from lightning_n2uq.utils.compat import copy_each
from lightning_n2uq.utils.shards import is_sharded
from lightning_n2uq.utils.validation import check_choice, check_integer

StepAction = Literal["stop", "skip", "warn", "off"]
StateAction = Literal["stop", "warn", "off"]

# What is decided before an optimizer step, in the order in which one leads to the next.
_STEP_KINDS = ("input", "constant_batch", "loss", "gradient")
_STATE_KINDS = ("parameter", "floor", "scale", "weight")
_PHRASES = {
    "input": "NaN or inf in the input batch",
    "constant_batch": "the input batch is constant (zero variance)",
    "loss": "the loss is NaN or inf",
    "gradient": "NaN or inf in the gradient",
    "parameter": "NaN or inf in parameters or running statistics",
    "floor": "widths collapsed to their floor",
    "scale": "steps, clips or scales of quantizers at or below their floor",
    "weight": "weights are all equal",
}


class NonFiniteError(ArithmeticError):
    """Training was stopped by `NonFiniteGuard`; the message names the step, the place and what is wrong."""


class NonFiniteGuard(Callback):
    """Watches input, loss, gradients, parameters, widths, scales and weights; names what is wrong and where.

    Actions: `stop` raises `NonFiniteError` before the optimizer step, on every rank at the same step, with
    the weights as they were; `skip` leaves that optimizer step out on every rank; `warn` warns at the
    first case of every kind and place, and counts; `off` does not look.

    What a skipped step leaves out: every gradient is dropped, so parameters, momentum, Adam's averages and
    step counts and weight decay are untouched; running statistics of batch norms go back to what they were
    before the step's first batch (all accumulated batches are dropped). What goes on: the Trainer's step
    count, the learning rate schedule, metrics already updated and the random numbers used.

    Loss, gradient and input are judged once per optimizer step, with one small flag read from the device;
    with several ranks the flag is reduced first, so that all decide alike. With a gradient scaler
    (`16-mixed`) gradients are the scaler's business and are not judged. Parameters, widths and weights
    are judged every `every_n_steps` optimizer steps, before every validation and checkpoint, and at the end
    of training.

    Args:
        input: The action on NaN or inf in a floating point tensor of the batch.
        loss: The action on NaN or inf in the training loss.
        gradient: The action on NaN or inf in a gradient, after ranks were averaged and before clipping.
        parameter: The action on NaN or inf in a parameter (thresholds included) or a running statistic.
        floor: The action on widths of learned thresholds at their floor of 1e-3, where no gradient moves
            them.
        constant_batch: The action on a batch of two samples or more whose values are all equal.
        weight: The action on a layer whose weights are all equal or zero.
        max_skips: The largest number of optimizer steps skipped in a row; then the run stops all the same,
            since error feedback keeps a NaN and skipping forever would look like training.
        every_n_steps: Optimizer steps between two looks at parameters, widths, scales and weights.
        scale: The action on a quantizer's step or clip at its floor of 2^-23, below which it is not used, and
            on a scale of learned thresholds at or below zero.

    Raises:
        ValueError: An argument is impossible.
    """

    def __init__(
        self,
        input: StepAction = "stop",
        loss: StepAction = "stop",
        gradient: StepAction = "stop",
        parameter: StateAction = "stop",
        floor: StateAction = "warn",
        constant_batch: StepAction = "warn",
        weight: StateAction = "warn",
        max_skips: int = 10,
        every_n_steps: int = 50,
        scale: StateAction = "warn",
    ) -> None:
        self.actions: dict[str, str] = {
            "input": input, "loss": loss, "gradient": gradient, "parameter": parameter, "floor": floor,
            "scale": scale, "constant_batch": constant_batch, "weight": weight,
        }  # fmt: skip
        for kind, action in self.actions.items():
            check_choice(kind, action, get_args(StepAction if kind in _STEP_KINDS else StateAction))
        self.max_skips = check_integer("max_skips", max_skips, 1)
        self.every_n_steps = check_integer("every_n_steps", every_n_steps, 1)
        self.counts: Counter[str] = Counter()  # cases by kind, and skipped steps
        self._warned: set[str] = set()
        self._skips_in_a_row = 0
        self._flags: dict[str, Tensor] = {}
        # Of batch norms, where a step may be skipped: those in the model, and what they were before the step.
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        self._fresh, self._last_look = True, -1
        self._batch: object = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, and what was warned of already."""
        return {"counts": dict(self.counts), "warned": sorted(self._warned), "skips": self._skips_in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues to count."""
        self.counts = Counter(state_dict["counts"])
        self._warned = set(state_dict["warned"])
        self._skips_in_a_row = state_dict["skips"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the weights that training starts from."""
        self._fresh, self._last_look = True, -1
        skips = "skip" in self.actions.values()
        self._statistics = checks.norm_statistics(pl_module) if skips else []
        self._before = [buffer.clone() for buffer in self._statistics]
        self._judge_state(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Remembers running statistics where a step may be skipped, and checks the batch."""
        if self._fresh:
            self._fresh, self._flags = False, {}
            if self._statistics:
                copy_each(self._before, self._statistics)
        self._batch = batch
        tensors = checks.floating_tensors(batch)
        if tensors and (self._wants("input") or self._wants("constant_batch")):
            broken, constant = checks.batch_flags(tensors)
            self._raise_flag("input", broken)
            self._raise_flag("constant_batch", constant)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the loss."""
        self._raise_flag("loss", ~torch.isfinite(loss.detach()).all())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Decides, on all ranks alike, whether the step is taken."""
        groups = optimizer.param_groups
        gradients = [g for group in groups for p in group["params"] if (g := p.grad) is not None]
        if (
            gradients
            and self._wants("gradient")
            and getattr(trainer.precision_plugin, "scaler", None) is None
        ):
            self._raise_flag("gradient", checks.suspect_flag(gradients))
        self._fresh = True
        found = self._agreed(trainer, pl_module)
        # Every rank asks again, since all agree that a gradient is suspect.
        if "gradient" in found and not self._certain(trainer, checks.broken_flag(gradients)):
            found.remove("gradient")
        if not found:
            self._skips_in_a_row = 0
            return
        self._act(trainer, found, self._places(trainer, pl_module, found))
        if any(self.actions[kind] == "skip" for kind in found):
            self._skip(trainer, pl_module, found)
        else:
            self._skips_in_a_row = 0

    def _places(self, trainer: Trainer, pl_module: LightningModule, found: list[str]) -> dict[str, str]:
        """Returns where it is broken, by kind, as far as this rank sees it.

        What came before the loss broke it: parameters, running statistics, or a layer that a repeated forward
        pass of the last batch shows. A gradient breaks on the way back: the layer nearest to the loss comes
        first.
        """
        details = {}
        gradients = checks.broken_names(dict(reversed(checks.gradients(pl_module).items())))
        if "gradient" in found and gradients:
            details["gradient"] = gradients
        if "loss" in found:
            # Replicas' parameters are equal, so that either all ranks repeat the forward pass or none.
            state = checks.broken_names(checks.parameters(pl_module))
            alone = not is_sharded(pl_module)  # else a forward pass needs all ranks
            layer = first_broken_output(trainer, pl_module, self._batch) if alone and not state else None
            if state:
                details["loss"] = f"so are {state}"
            elif layer:
                details["loss"] = f"first in the output of {layer}"
            elif layer is not None and trainer.world_size == trainer.accumulate_grad_batches == 1:
                details["loss"] = "the outputs of all layers are finite"
            elif state := checks.broken_names(checks.state_tensors(pl_module)):
                details["loss"] = f"so are {state}"
            elif gradients:
                details["loss"] = f"so are the gradients of {gradients}"
        return details

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Checks the network every `every_n_steps` optimizer steps."""
        self._batch = None
        if self._fresh and trainer.global_step % self.every_n_steps == 0:
            self._judge_state(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the network before it is scored."""
        if trainer.state.fn == "fit":
            self._judge_state(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Checks the network before a checkpoint of it is written in training."""
        if trainer.training:  # other ranks may be elsewhere, as after an exception: no collective here
            self._judge_state(trainer, pl_module, together=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the last step's result and reports the counts."""
        self._judge_state(trainer, pl_module)
        if self.counts:
            cases = ", ".join(f"{kind} {count}" for kind, count in sorted(self.counts.items()))
            rank_zero_warn(f"NonFiniteGuard: cases in this run: {cases}")

    def _wants(self, kind: str) -> bool:
        return self.actions[kind] != "off"

    def _raise_flag(self, kind: str, flag: Tensor) -> None:
        """Keeps a flag on the device until the optimizer step, over all accumulated batches."""
        if self._wants(kind):
            before = self._flags.get(kind)
            self._flags[kind] = flag if before is None else before | flag

    def _agreed(self, trainer: Trainer, pl_module: LightningModule) -> list[str]:
        """Returns kinds that any rank found since the last optimizer step: the one read from the device."""
        zero = torch.zeros((), dtype=torch.bool, device=pl_module.device)
        row = torch.stack([self._flags.get(kind, zero).to(zero.device) for kind in _STEP_KINDS]).float()
        self._flags = {}
        if trainer.world_size > 1:
            row = trainer.strategy.reduce(row, reduce_op="max")  # type: ignore[assignment, arg-type]
        return [kind for kind, value in zip(_STEP_KINDS, row.tolist(), strict=True) if value]

    @staticmethod
    def _certain(trainer: Trainer, flag: Tensor) -> bool:
        """Returns whether the flag is set on any rank."""
        number = flag.float()
        if trainer.world_size > 1:
            number = trainer.strategy.reduce(number, reduce_op="max")  # type: ignore[assignment, arg-type]
        return bool(number.item())

    def _judge_state(self, trainer: Trainer, pl_module: LightningModule, together: bool = True) -> None:
        """Checks the network, on all ranks together: replicas' running statistics may differ."""
        if self._last_look == trainer.global_step:
            return
        self._last_look = trainer.global_step if together else self._last_look
        found: dict[str, str] = {}
        tensors = checks.state_tensors(pl_module) if self._wants("parameter") else {}
        if tensors:
            flag = checks.broken_flag(list(tensors.values()))
            if self._certain(trainer, flag) if together else bool(flag):
                found["parameter"] = checks.broken_names(tensors)
        if together or not is_sharded(pl_module):
            found |= self._collapsed(pl_module)
        if found:
            self._act(trainer, list(found), found)

    def _collapsed(self, pl_module: LightningModule) -> dict[str, str]:
        """Returns what has lost its range, by kind: of a sharded network the same on all ranks."""
        names = {
            "floor": checks.collapsed_widths,
            "scale": checks.collapsed_scales,
            "weight": checks.degenerate_weights,
        }
        found = {kind: look(pl_module) for kind, look in names.items() if self._wants(kind)}
        return {kind: checks.some_names(places) for kind, places in found.items() if places}

    def _act(self, trainer: Trainer, found: list[str], details: dict[str, str]) -> None:
        """Counts, then stops or warns."""
        self.counts.update(found)
        for kind in sorted(found, key=lambda kind: self.actions[kind] != "stop"):
            where = details.get(kind, "")
            line = f"step {trainer.global_step}: {_PHRASES[kind]}" + (f": {where}" if where else "")
            if self.actions[kind] == "stop":
                raise NonFiniteError(f"NonFiniteGuard: {line} (NonFiniteGuard's {kind}: stop)")
            if (key := f"{kind} {where}") not in self._warned:
                self._warned.add(key)
                rank_zero_warn(f"NonFiniteGuard: {line} ({self.actions[kind]}; counted from here on)")

    def _skip(self, trainer: Trainer, pl_module: LightningModule, found: list[str]) -> None:
        for parameter in pl_module.parameters():
            parameter.grad = None
        for current, before in zip(self._statistics, self._before, strict=True):
            current.copy_(before)
        self.counts["skipped_steps"] += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row > self.max_skips:
            raise NonFiniteError(
                f"NonFiniteGuard: step {trainer.global_step}: {self._skips_in_a_row} steps in a row had to "
                f"be skipped, max_skips allows {self.max_skips}; the last one since {_PHRASES[found[-1]]}"
            )
