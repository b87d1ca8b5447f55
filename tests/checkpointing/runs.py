"""Real runs of the real command on a tiny network, and what they leave."""

import csv
import json
import os
from pathlib import Path

import torch
import yaml

import warm

CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 3,
        "log_every_n_steps": 2,
        "limit_train_batches": 5,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [
            {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": ""}}
        ],
        "callbacks": [
            {"class_path": "ThresholdAnnealing"},
            {"class_path": "EntropyRegularizer", "init_args": {"weight": 0.01, "log_every_n_steps": 3}},
            {"class_path": "QuantizationMonitor", "init_args": {"every_n_steps": 4}},
            {"class_path": "interrupting.StopAt"},
        ],
    },
    "model": {
        "class_path": "QuantizedClassifier",
        "init_args": {
            "backbone": "resnet8", "backbone_args": {"width": 2}, "weight_bits": 2, "activation_bits": 2,
            "optimizer": "adam", "lr": 5.0e-3,
        },
    },
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"batch_size": 16, "shift": 1, "num_workers": 0},
    },
}  # fmt: skip
TWO_RANKS = {
    "devices": 2,
    "strategy": {
        "class_path": "lightning_n2uq.strategies.NUQSGDStrategy",
        "init_args": {"error_feedback": True, "bucket_size": 64, "min_numel": 16},
    },
}


def write_config(folder, **trainer):
    config = {**CONFIG, "trainer": {**CONFIG["trainer"], **trainer}}
    Path(folder, "tiny.yaml").write_text("# name: tiny\n" + yaml.safe_dump(config))


def fit(folder, *arguments, stop_at=None):
    """Runs `n2uq fit` to its end; returns the finished process."""
    return command("fit", folder, *arguments, STOP_AT=stop_at)


def command(name, folder, *arguments, **variables):
    """Runs a sub-command with variables in its environment; returns the finished process."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), str(Path(warm.__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }  # fmt: skip
    for variable in ("N2UQ_RUN_DIR", "N2UQ_RESUME_FROM", "STOP_AT", "STOP_IN"):
        environment.pop(variable, None)
    environment |= {variable: value for variable, value in variables.items() if value}
    return warm.n2uq(name, "--config", "tiny.yaml", *arguments, cwd=folder, env=environment)


def run_folders(folder):
    return sorted(path for path in Path(folder, "runs/tiny").iterdir() if path.is_dir())


def newest(folder):
    return torch.load(max(folder.glob("last*.ckpt"), key=lambda p: p.stat().st_mtime_ns), weights_only=True)


def differing(left, right, path=""):
    """Paths at which two nested values differ, tensors compared bit for bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = left.keys() | right.keys()
        return [p for k in keys for p in differing(left.get(k), right.get(k), f"{path}/{k}")]
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        return [
            p
            for i, (a, b) in enumerate(zip(left, right, strict=True))
            for p in differing(a, b, f"{path}/{i}")
        ]
    same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    return [] if same else [path]


def state(folder):
    """All of the last checkpoint that training depends on."""
    checkpoint = newest(folder)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "nuqsgd")
    callbacks = {k: v for k, v in checkpoint["callbacks"].items() if "ModelCheckpoint" not in k}
    random = checkpoint["exact_resume"]["ranks"]
    return {**{key: checkpoint.get(key) for key in kept}, "callbacks": callbacks, "random": random}


def rows(folder):
    """metrics.csv without the clock's column."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if v and k != "speed/steps_per_second"}
            for row in csv.DictReader(file)
        ]


def snapshots(folder):
    return [json.loads(line) for line in (folder / "quantization.jsonl").read_text().splitlines()]
