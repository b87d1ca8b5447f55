"""Mixed against uniform bits of equal bit operations, trained alike (docs/bit_allocation.md).

    python -m benchmarks.mixed_bits digits --seeds 0 1 2 3 4 5 --jobs 2
    python -m benchmarks.mixed_bits cifar10 --root cifar10-images.zip --jobs 2

For every seed a float network is trained, its layers are scored and given bits (`n2uq sensitivity`, budget:
what `--bits` uniform bits cost), and two networks are trained with the same config and seed: one with these
bits, one with uniform ones. On the digits they start from random weights, on CIFAR-10 images from the float
network. The figure is the test accuracy of the checkpoint with the best validation accuracy. Runs are kept
in `--folder` and the JSON file; those that are there are not repeated, and those of another length replace
the figures of their seed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import description
from lightning_n2uq.convert import Sensitivity, allocate_bits

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "mixed_bits.json"
LENGTHS = {
    "digits": {"float_epochs": 40, "epochs": 40, "train_fraction": 1.0},
    "cifar10": {"float_epochs": 4, "epochs": 2, "train_fraction": 0.3},
}


def _n2uq(folder: Path, command: str, *arguments: str) -> None:
    """Runs a command as a user would; `RuntimeError` with its last lines if it fails."""
    program = [sys.executable, "-m", "lightning_n2uq", command, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} in {folder}: exit code {done.returncode}\n{done.stderr[-2000:]}")


def _accuracy(folder: Path) -> float | None:
    """The test accuracy of a finished run in the folder, in percent."""
    for path in folder.rglob("metrics.csv"):
        with path.open(encoding="utf-8") as file:
            found = [float(row["test/acc"]) for row in csv.DictReader(file) if row.get("test/acc")]
        if found:
            return 100 * found[-1]
    return None


def _fit(folder: Path, configs: Sequence[str], epochs: int, options: Sequence[str]) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    done = _accuracy(folder)
    if done is None:
        arguments = [part for config in configs for part in ("--config", config)]
        arguments += ["--trainer.max_epochs", str(epochs), "--trainer.default_root_dir", str(folder)]
        arguments += ["--checkpoint.dirpath", str(folder), "--test_after_fit", "true", *options]
        _n2uq(folder, "fit", *arguments)
        done = _accuracy(folder)
    if done is None:
        raise RuntimeError(f"{folder}: got no test/acc in metrics.csv")
    return done


def _lengths(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in LENGTHS[options.data]}


def place_of(seed: int, options: argparse.Namespace) -> Path:
    """The folder of a seed's runs: of these lengths alone, so that no run is taken for a longer one."""
    lengths = "_".join(str(value) for value in _lengths(options).values())
    return Path(options.folder).resolve() / f"{options.data}_{options.bits}bit_seed{seed}_{lengths}"


def run(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Trains the three networks of a seed; returns their figures."""
    place = place_of(seed, options)
    data = ["--data.seed", str(seed)]
    if options.data == "cifar10":
        data += ["--data.root", str(Path(options.root).resolve()), "--data.val_fraction", "0.02"]
        data += ["--data.train_fraction", str(options.train_fraction)]
    common = ["--seed_everything", str(seed), *data]
    common += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    base, quantized = f"{options.data}/float.yaml", f"{options.data}/n2uq_w{options.bits}a{options.bits}.yaml"
    reference = _fit(place / "float", [base], options.float_epochs, common)
    start = place / "float" / "best.ckpt"
    budget, scores = f"bitops=uniform:{options.bits}", place / "scores" / "scores.json"
    scored = ["--config", base, "--ckpt_path", str(start), "--budget", budget, "-o", str(scores.parent)]
    if not (scores.parent / "mixed_bits.yaml").exists():
        _n2uq(place, "sensitivity", *scored, *data)
    chosen = allocate_bits(Sensitivity.from_mapping(json.loads(scores.read_text())), budget)
    common += ["--model.init_from", "null" if options.data == "digits" else str(start)]
    mixed = [quantized, str(scores.parent / "mixed_bits.yaml")]
    uniform = next(cost for width, cost in chosen.uniform().items() if str(width) == str(options.bits))
    return {
        "data": options.data,
        "bits": options.bits,
        "seed": seed,
        **_lengths(options),
        "float": reference,
        "uniform": _fit(place / "uniform", [quantized], options.epochs, common),
        "mixed": _fit(place / "mixed", mixed, options.epochs, common),
        "bitops": {"uniform": uniform[0], "mixed": chosen.cost},
        "kl": {"uniform": uniform[1], "mixed": chosen.score},
        "widths": sorted({str(width) for width in chosen.widths.values()}),
        "machine": description(torch.device("cpu")),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracies by seed, their means, and the mean difference with its standard error."""
    lines = [
        "| data, bits | seeds | mixed, mean [%] | uniform, mean [%] | mixed - uniform | float, mean [%] |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for data, bits in dict.fromkeys((run["data"], run["bits"]) for run in runs):
        group = [run for run in runs if (run["data"], run["bits"]) == (data, bits)]
        means = {name: statistics.mean(run[name] for run in group) for name in ("mixed", "uniform", "float")}
        differences = [run["mixed"] - run["uniform"] for run in group]
        error = f" +- {statistics.stdev(differences) / len(group) ** 0.5:.2f}" if len(group) > 1 else ""
        lines.append(
            f"| {data}, {bits} | {len(group)} | {means['mixed']:.2f} | {means['uniform']:.2f} "
            f"| {statistics.mean(differences):+.2f}{error} | {means['float']:.2f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mixed_bits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", choices=sorted(LENGTHS))
    parser.add_argument("--root", help="folder or .zip of CIFAR-10's images")
    parser.add_argument("--bits", type=int, default=3, choices=(3, 4), help="of the uniform network")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for name, kind in (("float_epochs", int), ("epochs", int), ("train_fraction", float)):
        parser.add_argument(f"--{name}", type=kind, help=f"default: {[v[name] for v in LENGTHS.values()]}")
    parser.add_argument("--folder", default="runs/mixed_bits", help="of checkpoints and logs")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time, one thread each")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(argv)
    if options.data == "cifar10" and options.root is None:
        parser.error("root: got none, needed for cifar10: a folder or .zip of its images")
    for name, value in LENGTHS[options.data].items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    kept = json.loads(options.output.read_text()) if options.output.exists() else []
    wanted = {"data": options.data, "bits": options.bits, **_lengths(options)}
    done = {old["seed"] for old in kept if wanted.items() <= old.items()}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(run, seed, options) for seed in options.seeds if seed not in done]
        for job in concurrent.futures.as_completed(jobs):
            new = job.result()
            print({name: new[name] for name in ("seed", "float", "uniform", "mixed")}, flush=True)
            one = ("data", "bits", "seed")
            kept = [old for old in kept if any(old[name] != new[name] for name in one)] + [new]
            kept.sort(key=lambda run: (run["data"], run["bits"], run["seed"]))
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(kept, indent=1) + "\n")
    print(table([run for run in kept if run["data"] == options.data]))


if __name__ == "__main__":
    main()
