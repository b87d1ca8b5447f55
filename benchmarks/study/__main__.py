"""An accuracy study in the background: started, stopped and continued at any time.

    python -m benchmarks.study cifar10 --data cifar10-images.zip --jobs 2   # works until all runs are done
    python -m benchmarks.study cifar10 --pause      # its processes stand still (for a quiet measurement)
    python -m benchmarks.study cifar10 --go-on
    python -m benchmarks.study cifar10 --status
    python -m benchmarks.study cifar10 --release networks   # weights, configs, figures, to ship
    python -m benchmarks.study cifar10 --table      # Markdown, and the pictures under docs/figures

Stop it with Ctrl-C or SIGTERM: its runs save their state, and the same command goes on from there. A run is
`n2uq fit --resume auto` with a shipped config; plan.py lists them with their settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.study import pictures, release, table
from benchmarks.study.plan import ROOT, STUDIES
from benchmarks.study.runner import PAUSE_FILE, Runner

RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Run what is missing, or do the one thing that an option asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmarks.study"
    )
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--data", help="folder or .zip of the images, as the data module takes it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--folder", type=Path, help="of checkpoints and logs (default: runs/study/STUDY)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="of the figures")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", help="of the pictures")
    action = parser.add_mutually_exclusive_group()
    for name, what in (
        ("--pause", "make running processes stand still"),
        ("--go-on", "end a pause"),
        ("--status", "list the runs"),
        ("--table", "print the table and draw the pictures"),
    ):
        action.add_argument(name, action="store_true", help=what)
    action.add_argument(
        "--release", type=Path, metavar="PLACE", help="write weights, configs and figures of the rows"
    )
    options = parser.parse_args()
    study = STUDIES[options.study]()
    folder = options.folder or Path("runs") / "study" / study.name
    if options.pause:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAUSE_FILE).touch()
    elif options.go_on:
        (folder / PAUSE_FILE).unlink(missing_ok=True)
    elif options.status:
        print(table.status(study, options.output))
    elif options.table:
        print(table.markdown(study, options.output))
        pictures.draw_all(study, options.output, options.figures)
    elif options.release:
        made = release.release(study, folder, options.output, options.release)
        print("\n".join(str(path) for path in made) or "no run of the study has finished")
    else:
        if options.data is None:
            parser.error("--data: missing, allowed is a folder or .zip of the images")
        if options.jobs < 1:
            parser.error(f"--jobs: got {options.jobs}, allowed is 1 or more")
        done = Runner(study, options.data, folder.resolve(), options.output, options.jobs).work()
        print(table.markdown(study, options.output))
        return 0 if done else 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
