"""The network compiled with `torch.compile`, except while a callback looks into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_n2uq.utils.compat import cpp_compiler_found, has_hooks, set_compiled_call, uncompiled_call
from lightning_n2uq.utils.validation import check_choice

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
_WITH_GRAPHS = ("reduce-overhead", "max-autotune")


class TorchCompile(Callback):
    """Runs chosen modules through `torch.compile`, in place: names in checkpoints stay as they are.

    A compiled network calls no hooks that came later, and would be compiled anew whenever a ramp moves. So
    a call runs uncompiled while any module inside has hooks (`QuantizationMonitor` at the steps that it
    measures, `EntropyRegularizer` on activations, `NonFiniteGuard` as it looks for a broken layer) or a ramp
    of `ThresholdAnnealing` above 0. Compiled and uncompiled calls compute the same but for last bits.

    On a GPU, where hundreds of short kernels leave a step bound by Python, `reduce-overhead` replays them
    as CUDA graphs.

    With several ranks the gradients of one compiled module arrive together at its end, so that their exchange
    waits for all of its backward pass: compile parts (`modules: ["backbone.layer*"]`) to overlap both.

    Args:
        mode: The mode of `torch.compile`: `default`, `reduce-overhead`, `max-autotune` or
            `max-autotune-no-cudagraphs`.
        modules: Shell patterns of names in the LightningModule; of nested matches the outer one is compiled.
        evaluation: Compiles evaluation too. Its scores are then those of the compiled network, which may
            differ in the last bits from those of the layers as written and of their export.
        backend: The backend of `torch.compile`.

    Raises:
        ValueError: A value is impossible, or no module matches; the message names the argument, the value and
            what is allowed.
    """

    def __init__(
        self,
        mode: Mode = "default",
        modules: Sequence[str] = ("backbone",),
        evaluation: bool = False,
        backend: str = "inductor",
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        check_choice("backend", backend, torch.compiler.list_backends(exclude_tags=()))
        if backend != "inductor" and mode != "default":
            raise ValueError(f"mode: got {mode!r} with backend {backend!r}, allowed is default")
        self.mode, self.evaluation, self.backend = mode, evaluation, backend
        self.patterns = tuple(modules)
        self.calls = {"compiled": 0, "uncompiled": 0}  # of training, all modules together
        self._modules: list[nn.Module] = []
        self._why = ""  # the last call was not compiled

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the compiled calls in, which compile at their first use; none for evaluation alone."""
        if stage != "fit" and not self.evaluation:
            return
        if self.mode in _WITH_GRAPHS:
            if (number := trainer.accumulate_grad_batches) != 1:
                raise ValueError(
                    f"mode: got {self.mode!r} with accumulate_grad_batches {number}, "
                    "allowed is 1: a CUDA graph overwrites the gradients of its last replay"
                )
            if trainer.strategy.root_device.type != "cuda":
                rank_zero_warn(f"TorchCompile: {self.mode!r} brings CUDA graphs, there is no CUDA device")
        on_cpu = self.backend == "inductor" and trainer.strategy.root_device.type == "cpu"
        if on_cpu and not cpp_compiler_found():
            raise ValueError("backend: got 'inductor' on the CPU, which needs a C++ compiler; none is found")
        self._release()
        for name, module in pl_module.named_modules():
            matches = any(fnmatchcase(name, pattern) for pattern in self.patterns)
            if name and matches and not any(module in set(outer.modules()) for outer in self._modules):
                self._modules.append(module)
                set_compiled_call(module, self._chosen(name, module))
        if not self._modules:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"modules: got {list(self.patterns)}, allowed are {names} and their parts")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Tells CUDA graphs that the last step's results are no longer needed."""
        if self.mode in _WITH_GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports how many calls ran compiled, with a warning where none did."""
        compiled, other = self.calls["compiled"], self.calls["uncompiled"]
        if other and not compiled:
            rank_zero_warn(f"TorchCompile: nothing ran compiled, the last step because of {self._why}")
        else:
            rank_zero_info(f"TorchCompile: {compiled} of {compiled + other} calls in training ran compiled")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the compiled calls."""
        self._release()

    def _release(self) -> None:
        for module in self._modules:
            set_compiled_call(module, None)
        self._modules.clear()

    def _chosen(self, name: str, module: nn.Module) -> Callable[..., Any]:
        """Returns `module`'s call, compiled where that is allowed."""
        options: dict[str, Any] = {} if self.mode == "default" else {"mode": self.mode}
        uncompiled = uncompiled_call(module)
        # Each size is compiled on its own: a last, smaller batch must not make every size a variable.
        compiled = torch.compile(uncompiled, backend=self.backend, dynamic=False, **options)
        parts = {f"{name}.{inner}" if inner else name: part for inner, part in module.named_modules()}

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 -- whatever the module takes
            if not (module.training or self.evaluation):
                return uncompiled(*args, **kwargs)
            why = next(_obstacles(parts), "")
            if module.training:
                self.calls["uncompiled" if why else "compiled"] += 1
                self._why = why
            return (uncompiled if why else compiled)(*args, **kwargs)

        call.compiles_training_only = not self.evaluation  # type: ignore[attr-defined]
        return call


def _obstacles(parts: dict[str, nn.Module]) -> Iterator[str]:
    """Yields what compiled code would miss, or would be compiled anew for."""
    for name, part in parts.items():
        if has_hooks(part):
            yield f"hooks on {name}"
        if getattr(part, "ramp", 0.0):
            yield f"the ramp of {name}"
