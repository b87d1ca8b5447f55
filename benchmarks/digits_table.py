"""Accuracy of every method on the handwritten digits: every config in configs/digits, several seeds.

    python benchmarks/digits_table.py                             # shows the stored results; trains nothing
    python benchmarks/digits_table.py --rerun --jobs 2            # trains anew: one to three minutes per run
    python benchmarks/digits_table.py --add --seeds 0 1 2 3 4     # trains what is not stored yet

Runs go through the ``n2uq`` command with the shipped configs. A seed sets the initial weights and the order
and shifts of the training images; all seeds share one split. The figure is the test accuracy of the
checkpoint with the best validation accuracy. Runs are kept in the JSON file with the machine that made them,
as long as their config's text stays the same; the table is printed as Markdown. Single seeds differ between
machines, since a rounding difference in the last bit changes where a run ends: compare means.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import hashlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "digits.json"
# Order of the table; configs that are not named here follow.
ORDER = ["float", "n2uq_w4a4", "n2uq_w3a3", "n2uq_w2a2", "n2uq_fixed_w2a2"]


def end_with_parent() -> None:
    """Makes a worker process end when the one that started it has been killed, instead of training on."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def workers(jobs: int) -> concurrent.futures.ProcessPoolExecutor:
    """Returns a pool of fresh processes that outlive nobody."""
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(jobs, context, initializer=end_with_parent)


def run(name: str, path: str, seed: int, more: Sequence[str] = ()) -> dict:
    """Trains and tests one config with one seed, and with further arguments; returns its figures."""
    from lightning_n2uq.cli import main  # in the worker process

    arguments = ["fit", "--config", path, "--seed_everything", str(seed), "--data.seed", str(seed)]
    arguments += [
        "--test_after_fit",
        "true",
        "--wandb",
        "disabled",
        "--trainer.enable_model_summary",
        "false",
    ]
    arguments += ["--trainer.enable_progress_bar", "false", *more]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            code = main([*arguments, "--trainer.default_root_dir", folder])
        if code:
            raise RuntimeError(f"{name}, seed {seed}: exit code {code}")
        (metrics,) = Path(folder).rglob("metrics.csv")
        with metrics.open() as file:
            rows = list(csv.DictReader(file))
    value = {key: [float(row[key]) for row in rows if row.get(key)] for key in ("test/acc", "val/acc")}
    return {
        "config": name,
        "seed": seed,
        "test_acc": value["test/acc"][-1],
        "best_val_acc": max(value["val/acc"]),
        "last_val_acc": value["val/acc"][-1],
        "seconds": round(time.perf_counter() - began, 1),
        "config_sha256": _digest(path),
    }


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _machine() -> dict:
    import torch

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cpus": os.cpu_count(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(runs: list[dict]) -> str:
    """Markdown table: mean and spread of the test accuracy over the seeds, in percent."""
    by_config: dict[str, list[float]] = {}
    for entry in sorted(runs, key=lambda entry: entry["seed"]):
        by_config.setdefault(entry["config"], []).append(100 * entry["test_acc"])
    names = [name for name in ORDER if name in by_config] + sorted(set(by_config) - set(ORDER))
    lines = [
        "| config | seeds | test accuracy, mean [%] | standard error | lowest to highest |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        values = by_config[name]
        error = f"{statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else "-"
        ends = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else "-"
        lines.append(
            f"| `digits/{name}` | {len(values)} | {statistics.mean(values):.2f} | {error} | {ends} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs what is asked for, then prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--configs", nargs="+", help="names in configs/digits (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on one thread")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rerun", action="store_true", help="train the chosen configs and seeds anew")
    how.add_argument("--add", action="store_true", help="train what is not stored of them")
    options = parser.parse_args(argv)

    paths = {path.stem: str(path) for path in sorted((ROOT / "configs" / "digits").glob("*.yaml"))}
    chosen = {name: paths[name] for name in options.configs or paths}
    kept = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    kept = [
        entry
        for entry in kept
        if paths.get(entry["config"]) and entry["config_sha256"] == _digest(paths[entry["config"]])
    ]
    shown = [entry for entry in kept if entry["config"] in chosen]
    if not (options.rerun or options.add):
        print(f"stored results of {options.output}; --rerun trains anew, --add what is missing")
        print(table(shown))
        return
    done = set() if options.rerun else {(entry["config"], entry["seed"]) for entry in kept}
    missing = [
        (name, path, seed)
        for seed in options.seeds
        for name, path in chosen.items()
        if (name, seed) not in done
    ]

    os.environ["OMP_NUM_THREADS"] = "1"  # a network this small is as fast, and repeatable on every machine
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with workers(options.jobs) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, *work) for work in missing]):
            new = {**future.result(), **_machine()}
            kept = [e for e in kept if (e["config"], e["seed"]) != (new["config"], new["seed"])] + [new]
            print({key: kept[-1][key] for key in ("config", "seed", "test_acc", "seconds")}, flush=True)
            kept.sort(key=lambda entry: (entry["config"], entry["seed"]))
            options.output.write_text(json.dumps({"runs": kept}, indent=1) + "\n")
    print(table([entry for entry in kept if entry["config"] in chosen]))


if __name__ == "__main__":
    main()
