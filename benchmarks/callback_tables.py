"""Shows the tables of docs/callbacks.md: ``python -m benchmarks.callback_tables``; nothing is trained.

Runs are those that `python -m benchmarks.callback_study` has added to `benchmarks/results/callbacks.jsonl`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

STORED = Path(__file__).parent / "results" / "callbacks.jsonl"
RANGES = STORED.with_name("callbacks_ranges.jsonl")
VARIANTS = {
    "none": "none",
    "annealing": "`ThresholdAnnealing(0, 0.5)`",
    "annealing, input to output": "the same, `order: input_to_output`",
    "annealing, frozen for the last 10 %": "the same, `freeze_after: 0.9`",
    "annealing, ramp gradient": "the same, `gradient: ramp`",
    "annealing over the first quarter": "`ThresholdAnnealing(0, 0.25)`",
    "bits 8, 4, 2": "`bits: [8, 4, 2]` at 0, 0.25, 0.5",
    "entropy penalty 10": "`EntropyRegularizer(10)`",
    "annealing and penalty 10": "annealing and penalty",
    "without rescaling": "without rescaling (`no_rescale`)",
    "without rescaling, penalty 10": "without rescaling, penalty",
}
"""What the study calls its variants, and the table."""

Runs = list[dict]


def stored() -> dict[tuple[str, str], Runs]:
    """Returns the runs of every data set and variant, in the order of their seeds."""
    found: dict[tuple[str, str], Runs] = {}
    for line in STORED.read_text().splitlines():
        run = json.loads(line)
        found.setdefault((run["data"], run["variant"]), []).append(run)
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in found.items()}


def study(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """Returns the rows of accuracy and entropy, the means of seeds 0, 1 and 2."""
    rows = []
    for variant, name in VARIANTS.items():
        cells = [name]
        for data in ("digits", "cifar10"):
            first = [100 * run["accuracy"] for run in runs[data, variant] if run["seed"] < 3]
            cells += [f"{statistics.mean(first):.2f}", ", ".join(f"{value:.2f}" for value in first)]
        entropy = statistics.mean(run["entropy"] for run in runs["cifar10", variant])
        rows.append(_row([*cells, f"{entropy:.3f}"]))
    return rows


def paired(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """Returns the rows of the variants that have more seeds, against none seed by seed."""
    rows = []
    for variant, name in VARIANTS.items():
        mine, none = runs["digits", variant], runs["digits", "none"]
        if len(mine) > 3:
            pairs = zip(mine, none, strict=True)
            less = [100 * (run["accuracy"] - other["accuracy"]) for run, other in pairs]
            values = [100 * run["accuracy"] for run in mine]
            apart = ["-", "-"] if mine is none else [f"{statistics.mean(less):.2f}", _error(less)]
            rows.append(_row([name, _seeds(mine), f"{statistics.mean(values):.2f}", *apart]))
    return rows


def shipped(runs: dict[tuple[str, str], Runs]) -> list[str]:
    """Returns the rows of the shipped configs with other callbacks, test accuracy of the best checkpoint."""
    rows = []
    for (data, variant), mine in runs.items():
        if data == "shipped":
            values = [100 * run["accuracy"] for run in mine]
            rows.append(_row([variant, _seeds(mine), f"{statistics.mean(values):.2f}", _error(values)]))
    return rows


def ranges() -> list[str]:
    """Returns the rows of `RangeInitialization` on the digits, by bits, with the difference seed by seed."""
    found: dict[tuple[int, str], dict[int, float]] = {}
    for line in RANGES.read_text().splitlines():
        run = json.loads(line)
        found.setdefault((run["bits"], run["variant"]), {})[run["seed"]] = 100 * run["accuracy"]
    rows = []
    for bits in (2, 4):
        none, mine = found[bits, "none"], found[bits, "ranges from data"]
        less = [mine[seed] - none[seed] for seed in none]
        means = [f"{statistics.mean(values.values()):.2f}" for values in (none, mine)]
        seeds = f"{min(none)}-{max(none)}"
        rows.append(_row([f"W{bits}A{bits}", seeds, *means, f"{statistics.mean(less):+.2f}", _error(less)]))
    return rows


def gaussian() -> list[str]:
    """Returns the rows of the entropy of Gaussian weights `[64, 576]`, by the way that they are scaled."""
    from lightning_n2uq.ops.entropy import entropy_bits, hard_histogram
    from lightning_n2uq.quantizers.n2uq import EntropyPreservingWeightQuantizer

    weight = torch.randn(64, 576, generator=torch.Generator().manual_seed(0))
    rows = []
    for bits in (2, 3, 4):
        cells = [f"W{bits}"]
        for rescale in (True, False):
            quantizer = EntropyPreservingWeightQuantizer(bits)
            quantizer.rescale = rescale
            entropy = float(entropy_bits(hard_histogram(quantizer.codes(weight), quantizer.num_levels)))
            cells.append(f"{entropy:.3f} ({100 * entropy / bits:.1f} %)")
        rows.append(_row(cells))
    return rows


TABLES: dict[str, Callable[[dict[tuple[str, str], Runs]], list[str]]] = {
    "| callback | digits | by seed | CIFAR-10 | by seed | weight entropy (CIFAR-10) |": study,
    "| callback, digits | seeds | mean | less none | standard error |": paired,
    "| config | seeds | mean | standard error |": shipped,
    "| digits | seeds | over 0 to 2 | ranges from data | difference | standard error |": lambda _: ranges(),
    "| bits | entropy-preserving scale | `max abs(W)` (`no_rescale`) |": lambda _: gaussian(),
}
"""By head."""


def main() -> None:
    """Prints every table as Markdown."""
    runs = stored()
    for head, rows_of in TABLES.items():
        print("\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows_of(runs), ""]))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seeds(runs: Runs) -> str:
    return f"{runs[0]['seed']}-{runs[-1]['seed']}"


def _error(values: list[float]) -> str:
    return f"{statistics.stdev(values) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
