"""`python -m benchmarks`: measures ours and others side by side, writes JSON and plots.

    python -m benchmarks                          # everything, some minutes
    python -m benchmarks quantizers steps         # some topics
    python -m benchmarks --quick                  # small inputs, a check that everything runs

Every figure is a ratio within one process: candidates take turns. Spread is given as quartiles. Results
are merged into the JSON file by topic, each with the machine's description. The tracked figures
(benchmarks/results/kernels.json, docs/figures) are written with `--keep` alone; otherwise results go to the
folder build/benchmarks. `--quick` never keeps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import codec, evaluation, export_speed, layouts, plots, quantizers, scaling, sharded, steps
from benchmarks.machine import description

ROOT = Path(__file__).resolve().parent
KEPT, FIGURES = ROOT / "results" / "kernels.json", ROOT.parent / "docs" / "figures"
SCRATCH = ROOT.parent / "build" / "benchmarks" / "kernels.json"
TOPICS: dict[str, Callable[..., dict[str, object]]] = {
    "quantizers": quantizers.run,
    "scaling": scaling.run,
    "steps": steps.run,
    "layouts": layouts.run,
    "codec": codec.run,
    "export": export_speed.run,
    "evaluation": evaluation.run,
    "sharded": sharded.run,
}
QUICK: dict[str, dict[str, object]] = {
    "quantizers": {"shape": (4, 16, 14, 14)},
    "scaling": {"largest": 2**14},
    "steps": {"batch": 1, "size": 64},
    "layouts": {"batch": 1, "size": 64},
    "codec": {"numel": 100_000},
    "export": {"size": 64, "threads": (1,), "batches": (1,), "bits": (2,), "rounds": 3},
    "evaluation": {"batch": 1, "size": 64},
    "sharded": {"width": 32, "depth": 1, "tokens": 64},
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("topics", nargs="*", help=f"any of {', '.join(TOPICS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="small inputs, short times; no figures to quote")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for every comparison")
    parser.add_argument("--threads", type=int, default=2, help="threads on CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--keep", action="store_true", help="replace the tracked figures of these topics")
    parser.add_argument("--output", type=Path, help="the file (default: build/benchmarks/kernels.json)")
    parser.add_argument("--plots", type=Path, help="folder of the plots (default: that of the file)")
    chosen = parser.parse_args(argv)
    if chosen.keep and (chosen.quick or chosen.output or chosen.plots):
        parser.error("keep: got --keep with --quick, --output or --plots, allowed is one or the other")
    chosen.output = chosen.output or (KEPT if chosen.keep else SCRATCH)
    chosen.plots = chosen.plots or (FIGURES if chosen.keep else chosen.output.parent)
    unknown = sorted(set(chosen.topics) - set(TOPICS))
    if unknown:
        parser.error(f"topics: got {', '.join(unknown)}, allowed are {', '.join(TOPICS)}")
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen topics; what was measured before of the others stays in the file."""
    chosen = arguments(argv)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    device = torch.device(chosen.device)
    results = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for topic in chosen.topics or TOPICS:
        print(f"== {topic}")
        machine = description(device)
        options = QUICK[topic] if chosen.quick else {}
        figures = TOPICS[topic](device, 0.2 if chosen.quick else chosen.seconds, **options)
        stamp = time.strftime("%Y-%m-%d", time.gmtime())
        results[topic] = {**figures, "machine": machine, "quick": chosen.quick, "date": stamp}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {chosen.output}")
    try:
        drawn = plots.draw(json.loads(chosen.output.read_text()), chosen.plots)
    except ImportError:
        print("no plots: matplotlib is not installed")
    else:
        print("plots: " + ", ".join(str(path) for path in drawn))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
