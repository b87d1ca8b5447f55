"""`python -m benchmarks.networks`: converts, trains, resumes and exports every network of the catalog.

    python -m benchmarks.networks                         # those that have no result yet, one after the other
    python -m benchmarks.networks --only 'timm *'         # some of those
    python -m benchmarks.networks --only 'timm *' --again # whether they have one or not
    python -m benchmarks.networks --table                 # what is known, as a table

Results are kept after every network in one JSON file, so that a run may be stopped at any time and goes on
where it was. Several at once, each with its own `--only`, may share the file. Networks of transformers need
the extra `transformers`.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.networks.catalog import NETWORKS
from benchmarks.networks.table import table
from benchmarks.networks.trial import trial
from lightning_n2uq.utils.atomic import replacing

FILE = Path(__file__).resolve().parent.parent / "results" / "networks.json"


def main(argv: list[str] | None = None) -> int:
    """Runs what was asked for; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", metavar="PATTERN", help="names to run, as a shell pattern")
    parser.add_argument("--again", action="store_true", help="run those that have a result, too")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    parser.add_argument("--output", type=Path, default=FILE)
    chosen = parser.parse_args(argv)
    names = [name for name in NETWORKS if chosen.only is None or fnmatchcase(name, chosen.only)]
    if not names:
        parser.error(f"--only: got {chosen.only!r}, which fits none of {', '.join(NETWORKS)}")
    for name in [] if chosen.table else names:
        if chosen.again or name not in _known(chosen.output):
            _keep(chosen.output, name, trial(NETWORKS[name]))
    results = _known(chosen.output)
    print(table({name: results[name] for name in NETWORKS if name in results}))
    return 0


def _known(path: Path) -> dict[str, Any]:
    """Returns the results of a file, those that another run has added since included."""
    return json.loads(path.read_text()) if path.exists() else {}  # type: ignore[no-any-return]


def _keep(path: Path, name: str, found: dict[str, Any]) -> None:
    """Adds a result to a file, which is whole at any time."""
    print(f"{name}: {found}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({**_known(path), name: found}, indent=1) + "\n"
    with replacing(path) as partial:
        partial.write_text(content)


if __name__ == "__main__":
    raise SystemExit(main())
