"""`python -m benchmarks.networks`: converts, trains, resumes and exports every network of the catalog.

    python -m benchmarks.networks                     # those that have no result yet, one after the other
    python -m benchmarks.networks --only 'timm *'     # some, again
    python -m benchmarks.networks --table             # what is known, as a table

Results are kept after every network in one JSON file, so that a run may be stopped at any time. Networks of
transformers need the extra `transformers`.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.networks.catalog import NETWORKS
from benchmarks.networks.table import table
from benchmarks.networks.trial import trial

FILE = Path(__file__).resolve().parent.parent / "results" / "networks.json"


def main(argv: list[str] | None = None) -> int:
    """Runs what was asked for; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", metavar="PATTERN", help="names to run again, as a shell pattern")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    parser.add_argument("--output", type=Path, default=FILE)
    chosen = parser.parse_args(argv)
    results = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    names = [name for name in NETWORKS if chosen.only is None or fnmatchcase(name, chosen.only)]
    if not names:
        parser.error(f"--only: got {chosen.only!r}, which fits none of {', '.join(NETWORKS)}")
    for name in [] if chosen.table else names:
        if chosen.only is None and name in results:
            continue
        results[name] = trial(NETWORKS[name])
        print(f"{name}: {results[name]}", flush=True)
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table({name: results[name] for name in NETWORKS if name in results}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
