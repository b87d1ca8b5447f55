"""`sensitivity`: how much a network suffers when one of its layers has few bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_n2uq.convert.calibration import evaluating, run_batch
from lightning_n2uq.convert.divergence import divergence, log_probabilities
from lightning_n2uq.convert.multiplications import multiplications
from lightning_n2uq.convert.policy import Policy
from lightning_n2uq.convert.quantize import swap
from lightning_n2uq.convert.scores import LayerScores, Sensitivity
from lightning_n2uq.convert.trials import Candidate, Trial, find
from lightning_n2uq.convert.widths import Width, at_width, widths
from lightning_n2uq.utils.compat import tree_leaves
from lightning_n2uq.utils.validation import check, check_integer

BITS = (2, 3, 4, 6, 8)
BATCHES = 4
Loss = Callable[[Any, Any], "Tensor | float"]


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    bits: Sequence[int | str] = BITS,
    policy: Policy | Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    max_batches: int = BATCHES,
    example: Any = None,  # noqa: ANN401 -- whatever the model takes
    forward: Callable[[Any], object] | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Scores every layer that `policy` quantizes: what happens to outputs and loss with it alone at few bits.

    Everything is compared with the network as it is. Trials use uniform quantizers that are fitted to the
    batches, since methods with learned levels show what they can do only after training. Afterwards the
    network is what it was.

    Args:
        model: The network, best a trained one in full precision. Layers of a quantized one are tried with
            other bits than they have; a layer with the same bits scores 0.
        batches: The data, as `calibrate` takes them.
        bits: What to try: `4` for weights and inputs alike, `"2/4"` for weights and inputs.
        policy: Says which layers are quantized and by which methods; its own bits do not matter.
        loss: Returns the loss of `(output, batch)`; without it outputs alone are compared.
        max_batches: The largest number of batches to use.
        example: An input that tells first and last layers, as in `quantize_model`.
        forward: How to run a batch, where the model does not take it as it is.
        progress: Whether to show a progress bar on standard error.

    Raises:
        ValueError: A width is impossible for a method, there is no batch, no layer or nothing to compare, or
            the network's own outputs or loss are not finite.
    """
    policy = policy if isinstance(policy, Policy) else Policy.from_mapping(policy or {})
    tried = widths(bits)
    check_integer("max_batches", max_batches, 1)
    example = getattr(model, "example_input_array", None) if example is None else example
    candidates, left_out = find(model, policy, example)
    for candidate in candidates:
        for one in tried:
            at_width(candidate.spec, one).build(2)  # refuses bits that the method does not have
    kept = list(islice(batches, max_batches))
    if not kept:
        raise ValueError("batches: got none, allowed is at least one")
    with _left_alone(model):
        runner = _Runner(model, kept, loss, forward)
        macs = runner.begin(candidates)
        left_out |= {c.layer.name: "no batch reached it" for c in candidates if not macs[c.layer.name]}
        reached = [c for c in candidates if macs[c.layer.name]]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())[:300]
        if not reached:
            raise ValueError(
                f"policy: got one without layers to score ({reasons}), allowed is one with a layer"
            )
        layers = [
            _scores(runner, model, candidate, tried, macs[candidate.layer.name], policy)
            for candidate in _shown(reached, progress)
        ]
    return Sensitivity(layers, tried, policy, len(kept), runner.reference_loss, left_out)


def _scores(
    runner: _Runner, model: nn.Module, candidate: Candidate, tried: Iterable[Width], macs: int, policy: Policy
) -> LayerScores:
    layer = candidate.layer
    first, last = layer.is_first and policy.skip_first, layer.is_last and policy.skip_last
    position = "first" if first else "last" if last else "any"
    scores = LayerScores(layer.name, candidate.weights, macs, candidate.spec, position)
    trial = Trial(model, candidate, runner.run)
    for bits in tried:
        with trial.at(bits):
            kl, loss = runner.compare()
        if kl is not None:
            scores.kl[bits] = kl
        if loss is not None and runner.reference_loss is not None:
            scores.loss[bits] = loss - runner.reference_loss
    return scores


class _Runner:
    """Runs the batches and compares what comes out with what came out first."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        loss: Loss | None,
        forward: Callable[[Any], object] | None,
    ) -> None:
        self.model, self.batches, self.loss, self.forward = model, batches, loss, forward
        self.device = next(model.parameters()).device
        self.reference: list[Tensor | None] = []
        self.reference_loss: float | None = None

    def begin(self, candidates: Iterable[Candidate]) -> dict[str, int]:
        """Keeps the outputs to compare with; returns every layer's multiplications for one input."""
        counts = {candidate.layer.name: 0 for candidate in candidates}
        with ExitStack() as stack:
            for candidate in candidates:
                stack.callback(candidate.module.register_forward_hook(_counter(candidate, counts)).remove)
            outputs = [self._output(batch) for batch in self.batches]
        self.reference = [log_probabilities(output) for output in outputs]
        for x in self.reference:
            check(
                x is None or bool(x.isfinite().all()), "model", "outputs that are not finite", "are numbers"
            )
        if self.loss is not None:
            self.reference_loss = self._mean_loss(outputs)
            check(math.isfinite(self.reference_loss), "loss", self.reference_loss, "is a finite number")
        if any(x is None for x in self.reference) and self.loss is None:
            raise ValueError(
                f"loss: got none, and {type(self.model).__name__} returns no scores of classes (but a "
                f"{type(outputs[0]).__name__}), allowed is a loss of the outputs"
            )
        size = sum(_size(batch) for batch in self.batches)
        return {name: round(count / size) for name, count in counts.items()}

    def run(self) -> None:
        """Runs the batches for what layers see."""
        for batch in self.batches:
            self._output(batch)

    def compare(self) -> tuple[float | None, float | None]:
        """Returns the divergence from the reference and the loss, means over batches."""
        outputs = [self._output(batch) for batch in self.batches]
        loss = None if self.loss is None else self._mean_loss(outputs)
        total = 0.0
        for before, output in zip(self.reference, outputs, strict=True):
            after = log_probabilities(output)
            if before is None or after is None:
                return None, loss
            total += divergence(before, after)
        return total / len(outputs), loss

    def _output(self, batch: Any) -> Any:  # noqa: ANN401
        return run_batch(self.model, batch, self.device) if self.forward is None else self.forward(batch)

    def _mean_loss(self, outputs: list[Any]) -> float:
        assert self.loss is not None
        values = [float(self.loss(x, batch)) for x, batch in zip(outputs, self.batches, strict=True)]
        return sum(values) / len(values)


def _counter(candidate: Candidate, counts: dict[str, int]) -> Callable[..., None]:
    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        counts[candidate.layer.name] += multiplications(module, candidate.weights, inputs, output)

    return count


def _size(batch: Any) -> int:  # noqa: ANN401
    """Returns how many inputs a batch holds: the first dimension of its first tensor, or a list's length."""
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], (tuple, list)):
        return max(1, len(batch[0]))
    tensors = [x for x in tree_leaves(batch) if isinstance(x, Tensor)]
    return max(1, len(tensors[0])) if tensors and tensors[0].dim() else 1


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Evaluates with plain transformer layers, and brings random numbers and switches back."""
    kinds = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    switches = [(m, m.activation_relu_or_gelu) for m in kinds]
    with torch.random.fork_rng([]), evaluating(model):
        swap(model, {})  # off with fused inference, which reads raw weights
        try:
            yield
        finally:
            for module, value in switches:
                module.activation_relu_or_gelu = value


def _shown(candidates: list[Candidate], progress: bool) -> Iterable[Candidate]:
    if not progress:
        return candidates
    from rich.console import Console
    from rich.progress import track

    return track(candidates, description="scoring layers", console=Console(stderr=True))
