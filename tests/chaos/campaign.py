"""A campaign of random faults, which runs until it is told to stop (Ctrl-C, SIGTERM, --seconds).

    python tests/chaos/campaign.py                  # goes on with the next seed of its record
    python tests/chaos/campaign.py --seeds 17 40    # these only
    python tests/chaos/campaign.py --table          # what was found so far

Every trial trains a small job whose result is known, strikes it once to three times (signals to any rank,
ranks that stand still, a full disk, broken images, a cut link, a second command, damaged checkpoints and
compiled kernels), then lets it finish. It must end with the bits of an undisturbed run, or name in one line
what cannot be used. Anything else is lost: its folder is kept, and the campaign ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import chaos_jobs
from chaos_trial import reference, trial


def main(argv: list[str] | None = None) -> int:
    """Runs trials; returns 1 if something was lost."""
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long to go on")
    parser.add_argument("--seeds", type=int, nargs="+", help="these seeds only")
    parser.add_argument("--jobs", nargs="+", default=sorted(chaos_jobs.JOBS), choices=sorted(chaos_jobs.JOBS))
    parser.add_argument("--record", type=Path, default=Path("runs/chaos.jsonl"), help="a line per trial")
    parser.add_argument("--table", action="store_true", help="only print what the record holds")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(arguments.record))
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell in the background leaves the first ignored
        signal.signal(number, signal.default_int_handler)
    place = Path(tempfile.mkdtemp(prefix="chaos"))
    try:
        return _campaign(arguments, place)
    except KeyboardInterrupt:
        return 0
    finally:
        print(table(arguments.record))
        shutil.rmtree(place / "whole", ignore_errors=True)


def _campaign(arguments: argparse.Namespace, place: Path) -> int:
    until = time.monotonic() + arguments.seconds
    cache = arguments.record.parent.resolve() / "chaos-kernels"
    cache.mkdir(parents=True, exist_ok=True)
    references = {job: reference(place / "whole" / job, job, cache) for job in arguments.jobs}
    seeds = arguments.seeds or range(_next_seed(arguments.record), sys.maxsize)
    lost = 0
    for seed in seeds:
        if time.monotonic() > until:
            break
        folder = place / f"seed{seed}"
        record = trial(seed, folder, references, cache)
        with arguments.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.as_dict()) + "\n")
        print(
            f"{seed}: {record.job}: {'; '.join(record.events)}: {record.outcome} {record.detail}", flush=True
        )
        if record.outcome == "lost":
            lost += 1
            print(f"kept in {folder}", flush=True)
        else:
            shutil.rmtree(folder)
    return int(lost > 0)


def _lines(record: Path) -> list[dict[str, object]]:
    if not record.exists():
        return []
    return [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]


def _next_seed(record: Path) -> int:
    return 1 + max((int(str(line["seed"])) for line in _lines(record)), default=0)


def table(record: Path) -> str:
    """Returns outcomes by kind of fault, as Markdown."""
    counts: dict[str, Counter[str]] = {}
    for line in _lines(record):
        for event in line["events"]:  # type: ignore[attr-defined]
            kind = str(event).partition(":")[0].partition(" (")[0]
            kind = "damaged" if kind.startswith(("damaged", "deleted", "no checkpoint")) else kind
            counts.setdefault(kind, Counter())[str(line["outcome"])] += 1
    rows = [f"| {kind} | {c['exact']} | {c['named']} | {c['lost']} |" for kind, c in sorted(counts.items())]
    return "\n".join(["| fault | exact | named | lost |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())
