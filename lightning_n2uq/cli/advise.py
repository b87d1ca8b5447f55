"""`n2uq advise`: which method and how many bits would pay on a job, from what a run of it has measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from lightning_n2uq.cli.command_parser import command_parser
from lightning_n2uq.utils.validation import check, check_integer, check_number

EXAMPLES = """
  n2uq fit --config FILE --trainer.strategy nuqsgd --trainer.callbacks+=CommunicationMonitor
  n2uq advise runs/...                             that job, on its own link
  n2uq advise runs/... --ranks 16 --mbit 1000      sixteen ranks on another link
  n2uq advise --ckpt_path runs/.../last.ckpt       from a checkpoint

The errors are those of the averaged gradient, squared, relative to it, on gradients of the run; "-" stands
for a biased method. Columns are per step; nothing is taken to overlap with the backward pass
(docs/scaling.md).
"""


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    p = command_parser("advise", __doc__, EXAMPLES)
    p.add_argument("run", nargs="?", metavar="RUN", help="the folder of a run with CommunicationMonitor")
    p.add_argument("--ckpt_path", metavar="FILE", help="a checkpoint of such a run, in place of RUN")
    p.add_argument("--ranks", type=int, help="the number of ranks (default: the run's)")
    p.add_argument("--per_node", type=int, help="the ranks of a node (default: the run's)")
    p.add_argument("--mbit", type=float, help="the speed of a node's link in Mbit/s (default: as measured)")
    p.add_argument("--latency_us", type=float, default=50.0, help="with --mbit: microseconds per message")
    p.add_argument("--period", type=int, default=10, help="steps between two exchanges of nuqsgd_local")
    p.add_argument("--max_error", type=float, default=0.5, help="the largest error to recommend")
    p.add_argument("--json", action="store_true", help="print JSON")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = parser().parse_args(list(argv))
    one = (options.run is None) != (options.ckpt_path is None)
    check(one, "run", options.run, "is the folder of a run, or else --ckpt_path")
    check_integer("period", options.period, 1)
    check_number("max_error", options.max_error, 0.0)
    for name in ("ranks", "per_node"):
        if getattr(options, name) is not None:
            check_integer(name, getattr(options, name), 1)
    from lightning_n2uq.scaling.advice import Advisor, recommendation, table
    from lightning_n2uq.scaling.cluster import Link
    from lightning_n2uq.scaling.measured import of_checkpoint, of_run

    link = None
    if options.mbit is not None:
        check_number("mbit", options.mbit, 0.0, above=True)
        check_number("latency_us", options.latency_us, 0.0)
        link = Link(options.mbit / 1e3, options.latency_us * 1e-6)
    measured = of_run(options.run) if options.run is not None else of_checkpoint(options.ckpt_path)
    advisor = Advisor(measured, link, options.ranks, options.per_node, options.period)
    check(advisor.cluster.ranks > 1, "ranks", advisor.cluster.ranks, "are integers from 2")
    found = advisor.predictions()
    line = recommendation(found, options.max_error, options.period)
    if options.json:
        methods = [asdict(one) for one in found]
        print(json.dumps({"measured": asdict(measured), "methods": methods, "advice": line}, indent=1))
    else:
        print(f"{table(advisor, found)}\n\n{line}")
    return 0
