"""``python -m benchmarks.scale``: does compression pay on W ranks with B Gbit/s? Tables, check and plot.

python -m benchmarks.scale                                      # everything from the saved measurements
python -m benchmarks.scale --ranks 64 --gbit 10 --per-node 8 --numel 25600000     # your cluster
python -m benchmarks.scale --measure speeds error times:2 times:4 times:8 bytes:16  # measure again (root)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.scale import measure, picture, tables, validate
from benchmarks.scale.speeds import speeds_from
from lightning_n2uq.scaling.cluster import Cluster, Link
from lightning_n2uq.scaling.methods import METHODS

_ROOT = Path(__file__).parent.parent
_RESULTS = _ROOT / "results" / "scale.json"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, help="answer for one cluster: number of ranks")
    parser.add_argument("--gbit", type=float, default=10.0, help="bandwidth of a node in Gbit/s")
    parser.add_argument("--latency", type=float, default=50e-6, help="seconds per message between nodes")
    parser.add_argument("--per-node", type=int, default=1, help="ranks of a node")
    parser.add_argument("--numel", type=int, default=tables.NUMEL, help="gradient coordinates")
    parser.add_argument("--measure", nargs="+", help="speeds, error, times:HOSTS, bytes:HOSTS")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    parser.add_argument("--plot", type=Path, default=_ROOT.parent / "docs" / "figures" / "scaling.svg")
    return parser.parse_args(argv)


def answer(options: argparse.Namespace, saved: dict[str, Any]) -> str:
    """Return one line per method for the cluster asked for, the fastest first."""
    link = Link(options.gbit, options.latency)
    cluster = Cluster(options.ranks, link, options.per_node)
    speeds = speeds_from(saved["speeds"])
    times = {name: predict(options.numel, cluster, speeds) for name, predict in METHODS.items()}
    if options.per_node == 1:
        times = {name: seconds for name, seconds in times.items() if not name.endswith("_nodes")}
    width = max(map(len, times))
    return "\n".join(
        f"{name:<{width}} {1e3 * seconds:10.2f} ms per step, "
        f"{times['ddp'] / max(seconds, 1e-12):8.2f} times ddp"
        for name, seconds in sorted(times.items(), key=lambda item: item[1])
    )


def everything(options: argparse.Namespace, saved: dict[str, Any]) -> None:
    """Print all tables and draw the plot."""
    speeds = speeds_from(saved["speeds"])
    netlab = json.loads((_ROOT / "results" / "netlab.json").read_text())
    print(f"## Check\n\n{validate.render(validate.points(saved, netlab))}\n")
    for gbit in tables.GBIT:
        print(f"## {gbit:g} Gbit/s, one rank per node\n\n{tables.by_ranks(gbit, speeds)}\n")
    for gbit in (10.0, 100.0):
        print(f"## {gbit:g} Gbit/s, 8 ranks per node\n\n{tables.by_ranks(gbit, speeds, per_node=8)}\n")
    print(f"## Gbit/s up to which it pays\n\n{tables.break_even(speeds)}\n")
    print(f"## Squared error\n\n{tables.errors(saved['error']['curves'])}\n")
    try:
        picture.draw(saved, speeds, options.plot)
    except ImportError:
        print("no plot: matplotlib is not installed")
    else:
        print(f"plot: {options.plot}")


def main(argv: list[str] | None = None) -> None:
    """Measure, answer for one cluster, or print everything."""
    options = arguments(argv)
    if options.measure:
        measure.measure(options.measure, options.results)
        return
    saved = json.loads(options.results.read_text())
    if options.ranks is not None:
        print(answer(options, saved))
    else:
        everything(options, saved)


if __name__ == "__main__":
    main()
