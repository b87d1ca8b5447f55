"""``python -m benchmarks.netlab.accuracy``: accuracy against time over slow links, on the digits.

Four hosts of one rank each train the shipped configs with the registered strategies. Time is that of
training alone. Needs root and iproute2.

    python -m benchmarks.netlab.accuracy                                       # an hour on two quiet cores
    python -m benchmarks.netlab.accuracy --mbit 1000 --output accuracy.json    # accuracy, on a busy machine
    python -m benchmarks.netlab.accuracy --epochs 3 --seeds 0 --output speed.json   # seconds, on a quiet one
    python -m benchmarks.netlab.accuracy --merge accuracy.json --speeds speed.json
    python -m benchmarks.netlab.accuracy --merge accuracy.json --bytes accuracy.svg   # accuracy against bytes

What a network learns does not depend on the link, so that accuracy may be measured whenever there is time and
the seconds of a step when the machine is quiet.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.netlab.network import Network
from benchmarks.netlab.ranks import run_ranks

_RESULTS = Path(__file__).parent.parent / "results" / "netlab_accuracy.json"
METHODS = ["ddp", "ddp_fp16", "ddp_powersgd", "qsgd_inf", "alq", "nuqsgd"]
METHODS += ["nuqsgd_rotated_2bit", "nuqsgd_rotated_1bit", "nuqsgd_local"]


def render(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table: final test accuracy per seed and mean, seconds and megabytes per run."""
    lines = [
        "| config | method | accuracy, mean | per seed | s/run | MB sent/run |",
        "|---|---|---|---|---|---|",
    ]
    for config, method in dict.fromkeys((run["config"], run["method"]) for run in runs):
        group = [run for run in runs if (run["config"], run["method"]) == (config, method)]
        last = [run["curve"][-1] for run in group]
        each = ", ".join(f"{accuracy:.2f}" for _, accuracy in last)
        lines.append(
            f"| {config} | {method} | {mean(accuracy for _, accuracy in last):.2f} | {each} "
            f"| {mean(seconds for seconds, _ in last):.1f} | {mean(run['megabytes'] for run in group):.1f} |"
        )
    return "\n".join(lines) + "\n"


def retime(runs: Sequence[Mapping[str, Any]], speeds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs with the seconds per epoch of other, shorter runs of the same configs and methods.

    Args:
        runs: Their accuracies and bytes are kept.
        speeds: Runs of two epochs or more; the first epoch, in which buffers are made, is not counted.

    Raises:
        ValueError: If a config and method of ``runs`` has no run among ``speeds``.
    """
    seconds: dict[tuple[str, str], float] = {}
    for run in speeds:
        curve = run["curve"]
        seconds[run["config"], run["method"]] = (curve[-1][0] - curve[0][0]) / (len(curve) - 1)
    missing = sorted({(run["config"], run["method"]) for run in runs} - seconds.keys())
    if missing:
        raise ValueError(f"speeds: got no run of {missing}, allowed are files with every config and method")
    return [
        dict(run)
        | {
            "curve": [
                [seconds[run["config"], run["method"]] * epoch, accuracy]
                for epoch, (_, accuracy) in enumerate(run["curve"], 1)
            ]
        }
        for run in runs
    ]


def draw(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw test accuracy against training seconds, averaged over seeds, one panel per config."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    configs = list(dict.fromkeys(run["config"] for run in runs))
    figure, panels = plt.subplots(1, len(configs), figsize=(6 * len(configs), 4), squeeze=False)
    for panel, config in zip(panels[0], configs, strict=True):
        for method in dict.fromkeys(run["method"] for run in runs):
            curves = [run["curve"] for run in runs if (run["config"], run["method"]) == (config, method)]
            points = [
                [mean(column) for column in zip(*point, strict=True)] for point in zip(*curves, strict=True)
            ]
            panel.plot([x for x, _ in points], [y for _, y in points], label=method)
        panel.set(xlabel="seconds of training", ylabel="test accuracy, %", title=config, xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def points(runs: Sequence[Mapping[str, Any]], config: str) -> dict[str, tuple[float, list[float]]]:
    """Return, by method, the megabytes that a rank sends per step, and the last accuracy of each seed."""
    found = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        group = [run for run in runs if (run["config"], run["method"]) == (config, method)]
        if group:
            sent = mean(run["megabytes"] / run["steps"] for run in group)
            found[method] = (sent, [run["curve"][-1][1] for run in group])
    return found


def draw_bytes(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw test accuracy against bytes per step, a panel per config: each seed, mean and standard error."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    configs = list(dict.fromkeys(run["config"] for run in runs))
    figure, panels = plt.subplots(
        1, len(configs), figsize=(5 * len(configs), 3.6), squeeze=False, layout="constrained"
    )
    colours = {method: f"C{number}" for number, method in enumerate(dict.fromkeys(r["method"] for r in runs))}
    for panel, config in zip(panels[0], configs, strict=True):
        for method, (sent, accuracies) in points(runs, config).items():
            colour = colours[method]
            error = stdev(accuracies) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0
            panel.plot([sent] * len(accuracies), accuracies, ".", color=colour, alpha=0.4, markersize=5)
            panel.errorbar(
                sent, mean(accuracies), error, fmt="o", color=colour, capsize=4, markersize=5, label=method
            )
        panel.set(
            xlabel="megabytes sent by a rank per step", ylabel="test accuracy, %", title=config, xscale="log"
        )
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xticks([0.1, 0.2, 0.5, 1.0, 2.0])
        panel.legend(fontsize=8)
    plt.rcParams["svg.hashsalt"] = "lightning_n2uq"  # the same figures give the same file
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)


def main() -> None:
    """Train, print the table, write results and drawing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.netlab.accuracy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--mbit", type=int, default=100, help="link speed in Mbit/s")
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--configs", nargs="+", default=["float", "n2uq_w2a2"])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--epochs", default="20")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    parser.add_argument("--merge", type=Path, nargs="+", help="files of earlier runs: train nothing")
    parser.add_argument(
        "--bytes", type=Path, help="with --merge: only draw accuracy against bytes, into this"
    )
    parser.add_argument("--speeds", type=Path, help="with --merge: a short run whose seconds count instead")
    options = parser.parse_args()
    for name in ("speeds", "bytes"):
        if getattr(options, name) and not options.merge:
            parser.error(f"{name}: allowed with --merge only")
    if options.merge:
        runs = [run for path in options.merge for run in json.loads(path.read_text())]
        if options.bytes:
            draw_bytes(runs, options.bytes)
            return
        _finish(
            retime(runs, json.loads(options.speeds.read_text())) if options.speeds else runs, options.output
        )
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no network behind
    options.output.parent.mkdir(parents=True, exist_ok=True)
    choices = ["--configs", *options.configs, "--methods", *options.methods, "--seeds", *options.seeds]
    arguments = [*choices, "--epochs", options.epochs, "--output", str(options.output.absolute())]
    with Network(options.hosts, options.mbit) as network:
        run_ranks(network, "benchmarks.netlab.train", arguments, options.limit)
    _finish(json.loads(options.output.read_text()), options.output)


def _finish(runs: list[dict[str, Any]], output: Path) -> None:
    output.write_text(json.dumps(runs) + "\n")
    print(render(runs))
    draw(runs, output.with_suffix(".png"))


if __name__ == "__main__":
    main()
