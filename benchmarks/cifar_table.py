"""Accuracy on CIFAR-10 images: the shipped recipes, float first, every width from the one before it.

    python -m benchmarks.cifar_table --root cifar10-images.zip --jobs 2
    python -m benchmarks.cifar_table --root data --epochs 120 --float-epochs 200 --widths w4a4 w3a3 w2a2

Runs go through the ``n2uq`` command with the configs in configs/cifar10; the options above replace only their
lengths and share of the images. A seed sets first weights, order and augmentation; all seeds share one
split, and chains of different seeds run side by side (``--jobs``). The figure is the test accuracy of the
checkpoint with the best validation accuracy. Checkpoints stay in ``--folder`` and finished runs in the JSON
file, which are not repeated while config and options stay the same; the table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import statistics
import time
from pathlib import Path

from benchmarks.digits_table import workers
from benchmarks.machine import description

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "cifar10"
OUTPUT = ROOT / "benchmarks" / "results" / "cifar10.json"
QUIET = [
    "--wandb",
    "disabled",
    "--trainer.enable_model_summary",
    "false",
    "--trainer.enable_progress_bar",
    "false",
]


def train(config: str, seed: int, start: Path | None, options: argparse.Namespace) -> dict:
    """Train and test one shipped config; returns its figures.

    Args:
        config: name in configs/cifar10.
        seed: of everything but the split.
        start: checkpoint the run starts from, or None.
        options: command line.
    """
    from lightning_n2uq.cli import main  # in the worker process

    folder = Path(options.folder) / f"seed{seed}" / config
    epochs = options.float_epochs if config == "float" else options.epochs
    arguments = ["fit", "--config", str(CONFIGS / f"{config}.yaml"), "--test_after_fit", "true", *QUIET]
    arguments += ["--seed_everything", str(seed), "--data.seed", str(seed), "--data.root", options.root]
    arguments += ["--data.train_fraction", str(options.train_fraction), "--trainer.max_epochs", str(epochs)]
    arguments += ["--data.val_fraction", str(options.val_fraction)]
    arguments += ["--checkpoint.dirpath", str(folder), "--trainer.default_root_dir", str(folder / "log")]
    if start is not None:
        arguments += ["--model.init_from", str(start)]
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = main(arguments)
    if code:
        raise RuntimeError(f"{config}, seed {seed}: exit code {code}")
    newest = max((folder / "log").rglob("metrics.csv"), key=lambda path: path.stat().st_mtime)
    with newest.open() as file:
        rows = list(csv.DictReader(file))
    value = {key: [float(row[key]) for row in rows if row.get(key)] for key in ("test/acc", "val/acc")}
    return {
        "config": config,
        "seed": seed,
        "test_acc": value["test/acc"][-1],
        "best_val_acc": max(value["val/acc"]),
        "epochs": epochs,
        "train_fraction": options.train_fraction,
        "seconds": round(time.perf_counter() - began, 1),
        "config_sha256": _digest(config),
    }


def chain(seed: int, done: list[dict], options: argparse.Namespace) -> list[dict]:
    """Train everything of one seed that is not done: float, then each method from wide to narrow."""
    results = []
    for method in ["float", *options.methods]:
        start = Path(options.folder) / f"seed{seed}" / "float" / "best.ckpt"
        for config in [method] if method == "float" else [f"{method}_{width}" for width in options.widths]:
            if not _is_done(config, seed, done, options):
                results.append(train(config, seed, None if method == "float" else start, options))
                print(
                    {key: results[-1][key] for key in ("config", "seed", "test_acc", "seconds")}, flush=True
                )
                _keep(options.output, results[-1])
            start = Path(options.folder) / f"seed{seed}" / config / "best.ckpt"
    return results


def _digest(config: str) -> str:
    return hashlib.sha256((CONFIGS / f"{config}.yaml").read_bytes()).hexdigest()


def _is_done(config: str, seed: int, done: list[dict], options: argparse.Namespace) -> bool:
    epochs = options.float_epochs if config == "float" else options.epochs
    wanted = (config, seed, epochs, options.train_fraction, _digest(config))
    names = ("config", "seed", "epochs", "train_fraction", "config_sha256")
    return any(tuple(run[name] for name in names) == wanted for run in done)


def _keep(output: Path, run: dict) -> None:
    """Add a run to the file of several processes: one line each, appended at once."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(run) + "\n")


def table(runs: list[dict]) -> str:
    """Markdown table: mean, spread and each seed's test accuracy in percent."""
    by_config: dict[str, list[float]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        by_config.setdefault(run["config"], []).append(100 * run["test_acc"])
    lines = ["| config | test accuracy, mean of seeds [%] | per seed | against float |", "|---|---|---|---|"]
    base = statistics.mean(by_config["float"]) if "float" in by_config else float("nan")
    for name in sorted(by_config, key=lambda name: (name != "float", name)):
        mean = statistics.mean(by_config[name])
        each = ", ".join(f"{value:.2f}" for value in by_config[name])
        lines.append(f"| `cifar10/{name}` | {mean:.2f} | {each} | {mean - base:+.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="folder or .zip, as CIFAR10DataModule takes it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=["n2uq", "lsq"])
    parser.add_argument("--widths", nargs="+", default=["w4a4", "w2a2"], help="from wide to narrow")
    parser.add_argument("--epochs", type=int, default=3, help="of every quantized run")
    parser.add_argument("--float-epochs", type=int, default=6)
    parser.add_argument("--train-fraction", type=float, default=0.3)
    parser.add_argument("--val-fraction", type=float, default=0.02)
    parser.add_argument("--folder", default="runs/cifar10_table", help="of the checkpoints")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time, each on one thread")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    kept = json.loads(options.output.read_text())["runs"] if options.output.exists() else []
    lines = options.output.with_suffix(".jsonl")  # of a run of this program that was interrupted
    if lines.exists():
        kept += [json.loads(line) for line in lines.read_text().splitlines()]
    os.environ["OMP_NUM_THREADS"] = "1"
    with workers(options.jobs) as pool:
        for done in [pool.submit(chain, seed, kept, options) for seed in options.seeds]:
            kept += done.result()
    import torch

    kept.sort(key=lambda run: (run["config"], run["seed"]))
    options.output.write_text(
        json.dumps({"machine": description(torch.device("cpu")), "runs": kept}, indent=1) + "\n"
    )
    lines.unlink(missing_ok=True)
    print(table(kept))


if __name__ == "__main__":
    main()
