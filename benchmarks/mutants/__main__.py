"""`python -m benchmarks.mutants`: do the tests notice errors that are put into the code?

For every part in parts.yaml, errors are drawn from those that cosmic-ray can make in its modules; for each, a
fresh process runs the part's tests on a copy of the package: of `tests` those that execute the line, then all
of `jobs`, whose processes are not traced. Custom operators read their schemas from signatures and compiled
kernels are kept on disk, so that mutants must not share a process, nor be chosen by a switch at run time.
Survivors keep the `reason` that the results file already has for the same error.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.mutants.coverage_map import CoverageMap
from benchmarks.mutants.mutations import Mutation, mutations, sample
from benchmarks.mutants.trials import Workspace, preload

HERE = Path(__file__).parent
Trial = dict[str, Any]
Key = tuple[str, str, str]
OUTCOMES = {"passed": "survived", "failed": "killed", "timeout": "timeout"}
RESULTS = HERE.parent / "results" / "mutants.json"
SLOWEST, START = 4.0, 90.0  # a mutant hangs after so many times the unchanged code's seconds and the start's


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("parts", nargs="*", help="names in parts.yaml (default: all)")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each part (default: 40)")
    parser.add_argument("--all", action="store_true", help="every mutation instead of a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of each part (default: 60)")
    parser.add_argument("--label", default="now", help="key of the results (default: now)")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="checkout whose code is mutated")
    parser.add_argument("--table", type=Path, default=HERE / "parts.yaml", help="modules and tests")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="keep results of the same mutants")
    return parser.parse_args()


def main() -> None:
    """Runs the parts and writes results after every mutant."""
    options = arguments()
    root, table = options.root.resolve(), yaml.safe_load(options.table.read_text())
    if unknown := set(options.parts) - set(table):
        raise SystemExit(f"unknown parts: {', '.join(sorted(unknown))}; allowed are {', '.join(table)}")
    preload()
    for name in options.parts or table:
        candidates = [m for path in modules(root, table[name]["modules"]) for m in mutations(root, path)]
        chosen = candidates if options.all else sample(candidates, options.sample, options.seed)
        print(f"{name}: {len(chosen)} of {len(candidates)} mutants", flush=True)
        record = {"candidates": len(candidates), **table[name], "seed": options.seed}
        known = recorded(options.results, options.label, name) if options.resume else {}
        for found in run_part(root, table[name], chosen, 60 * options.minutes, known):
            save(options.results, options.label, name, record | found)


def modules(root: Path, patterns: list[str]) -> list[str]:
    """Returns the paths of modules that match, each pattern at least one of them."""
    found: list[str] = []
    for pattern in patterns:
        paths = sorted(str(path.relative_to(root)) for path in root.glob(pattern))
        if not paths:
            raise SystemExit(f"parts.yaml: no module matches {pattern!r}")
        found += paths
    return list(dict.fromkeys(found))


def run_part(
    root: Path, part: dict[str, list[str]], chosen: list[Mutation], limit: float, known: dict[Key, Trial]
) -> Iterator[dict[str, object]]:
    """Yields what is found after every mutant; what is `known` need not be tried."""
    with tempfile.TemporaryDirectory() as folder:
        space, log = Workspace(root, Path(folder, "code")), Path(folder, "log")
        seconds, found = {}, CoverageMap()
        for name in ("tests", "jobs"):
            if not part.get(name):
                continue
            outcome, seconds[name] = space.run(part[name], 1800.0, log, Path(folder, name))
            if outcome != "passed":
                raise SystemExit(f"the tests fail without a mutant:\n{log.read_text()[-3000:]}")
            print(f"  unchanged {name}: {seconds[name]:.1f} s", flush=True)
        if "tests" in seconds:
            found = CoverageMap.read(Path(folder, "tests"))
        begin, trials = time.monotonic(), []
        for mutation in chosen:
            if time.monotonic() - begin > limit:
                break
            tests = found.tests_of(mutation.module, (root / mutation.module).read_text(), mutation.start[0])
            rounds = [(tests, START + SLOWEST * sum(found.seconds[test] for test in tests))]
            rounds.append((part.get("jobs", []), START + SLOWEST * seconds.get("jobs", 0.0)))
            trials.append(trial(root, space, mutation, rounds, log, known))
            print(f"  {trials[-1]['outcome']:8} {trials[-1]['place']}  {trials[-1]['becomes']}", flush=True)
            yield {"seconds_unchanged": seconds, "trials": trials}


def trial(
    root: Path,
    space: Workspace,
    mutation: Mutation,
    rounds: list[tuple[list[str], float]],
    log: Path,
    known: dict[Key, Trial],
) -> Trial:
    """Shows one mutant to rounds of tests with their time limits, until one notices it."""
    source = (root / mutation.module).read_text()
    mutated = mutation.apply(source)
    found: Trial = {
        "place": f"{mutation.module}:{mutation.start[0]}",
        "operator": mutation.operator.removeprefix("core/"),
        "line": source.splitlines()[mutation.start[0] - 1].strip(),
        "becomes": "\n".join(_changed(source, mutated)),
        "tests": len(rounds[0][0]),
    }
    if _key(found) in known:
        return known[_key(found)]
    space.write(mutation.module, mutated)
    outcome, seconds = "passed", 0.0
    try:
        for tests, limit in rounds:
            if tests and outcome == "passed":
                outcome, more = space.run(tests, limit, log)
                seconds += more
    finally:
        space.write(mutation.module, source)
    by = _killer(log.read_text()) if outcome == "failed" else None
    return found | {"outcome": OUTCOMES[outcome], "by": by, "seconds": round(seconds, 1)}


def _changed(source: str, mutated: str) -> list[str]:
    old, new = source.splitlines(), mutated.splitlines()
    if len(old) != len(new):
        return ["(lines removed)"]
    return [after.strip() for before, after in zip(old, new, strict=True) if before != after]


def _killer(log: str) -> str | None:
    found = [line for line in log.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if found:
        return "tests/" + found[0].split(" - ")[0].partition("tests/")[2]
    return log.strip().splitlines()[-1][:200] if log.strip() else None


def recorded(path: Path, label: str, part: str) -> dict[Key, Trial]:
    """Returns the trials that the results file has."""
    results = json.loads(path.read_text()) if path.exists() else {}
    return {_key(found): found for found in results.get(label, {}).get(part, {}).get("trials", ())}


def save(path: Path, label: str, part: str, record: dict[str, object]) -> None:
    """Adds one part to the results, with the reasons that survivors had."""
    results = json.loads(path.read_text()) if path.exists() else {}
    run, old = results.setdefault(label, {}), recorded(path, label, part)
    reasons = {key: {"reason": found["reason"]} for key, found in old.items() if "reason" in found}
    trials = [found | reasons.get(_key(found), {}) for found in record["trials"]]
    survived = sum(t["outcome"] == "survived" for t in trials)
    score = {"mutants": len(trials), "survived": survived, "score": round(1 - survived / len(trials), 3)}
    run["machine"] = _machine()
    run[part] = score | record | {"trials": trials}
    path.write_text(json.dumps(results, indent=1) + "\n")


@functools.cache
def _machine() -> dict[str, object]:
    """Describes the machine in another process, since it imports the package, which this one must not."""
    code = "from benchmarks.machine import description; import json, torch;"
    code += "print(json.dumps(description(torch.device('cpu'))))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True, capture_output=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _key(found: Trial) -> Key:
    return found["place"].partition(":")[0], found["line"], found["becomes"]


if __name__ == "__main__":
    main()
