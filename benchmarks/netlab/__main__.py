"""``python -m benchmarks.netlab``: the table of the exchange over slow links. Needs root and iproute2."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.netlab.methods import NAMES
from benchmarks.netlab.network import Network
from benchmarks.netlab.ranks import run_ranks
from benchmarks.netlab.table import render

_RESULTS = Path(__file__).parent.parent / "results" / "netlab.json"


def run(
    mbit: int, hosts: int, methods: list[str], numel: int, steps: int, limit: float
) -> list[dict[str, object]]:
    """Measure methods on a network of the given speed.

    Args:
        mbit: Speed of every host's link in Mbit/s.
        hosts: Number of hosts, one rank each.
        methods: Names.
        numel: Coordinates to synchronise.
        steps: Measured steps per method.
        limit: Seconds after which everything is stopped.

    Raises:
        RuntimeError: If a rank fails or the time is over.
    """
    with tempfile.TemporaryDirectory() as folder, Network(hosts, mbit) as network:
        output = Path(folder) / "figures.json"
        arguments = [
            "--methods",
            *methods,
            "--numel",
            str(numel),
            "--steps",
            str(steps),
            "--output",
            str(output),
        ]
        run_ranks(network, "benchmarks.netlab.worker", arguments, limit)
        return [figure | {"mbit": mbit, "hosts": hosts} for figure in json.loads(output.read_text())]


def main() -> None:
    """Measure, print the tables and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.netlab", description=__doc__)
    parser.add_argument("--mbit", type=int, nargs="+", default=[100, 1000], help="link speeds in Mbit/s")
    parser.add_argument("--hosts", type=int, nargs="+", default=[4], help="numbers of hosts")
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--numel", type=int, default=11_000_000, help="gradient coordinates")
    parser.add_argument("--steps", type=int, default=5, help="measured steps per method")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds per network")
    parser.add_argument("--output", type=Path, default=_RESULTS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `timeout` leaves no network behind
    figures: list[dict[str, object]] = []
    for hosts in options.hosts:
        for mbit in options.mbit:
            part = run(mbit, hosts, options.methods, options.numel, options.steps, options.limit)
            print(render(part), flush=True)
            figures += part
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
