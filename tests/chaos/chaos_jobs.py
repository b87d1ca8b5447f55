"""What is trained under faults: small jobs whose uninterrupted result is known."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

BASE: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 6,
        "log_every_n_steps": 2,
        "limit_train_batches": 6,
        "limit_val_batches": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": ""}}],
        "callbacks": [{"class_path": "ThresholdAnnealing"}, {"class_path": "EntropyRegularizer"}],
    },
    "model": {
        "class_path": "QuantizedClassifier",
        "init_args": {"backbone": "resnet20", "backbone_args": {"width": 2}, "lr": 5.0e-3},
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 16, "num_workers": 0}},
}
FOLDER = {
    "class_path": "ImageFolderDataModule",
    "init_args": {"root": "images", "image_size": 16, "batch_size": 6, "num_workers": 1},
}
RANKS = {
    "devices": 2,
    "strategy": {
        "class_path": "lightning_n2uq.strategies.NUQSGDStrategy",
        "init_args": {"error_feedback": True, "bucket_size": 64, "min_numel": 16, "timeout": "0:00:30"},
    },
}
JOBS: dict[str, dict[str, Any]] = {
    "digits": {},
    "accumulated": {"trainer": {"accumulate_grad_batches": 4, "val_check_interval": 3}},
    "steps": {"checkpoint": {"every_n_train_steps": 4, "save_top_k": -1, "monitor": None}},
    "lsq": {
        "trainer": {"callbacks": []},
        "model.init_args": {"weight_quantizer": "lsq", "activation_quantizer": "lsq", "optimizer": "sgd"},
    },
    "images": {"data": FOLDER},
    "ranks": {"trainer": RANKS},
}


def write(folder: Path, job: str) -> None:
    """Writes a job's config, and its images where it has any, into an empty folder."""
    config = copy.deepcopy(BASE)
    for key, values in JOBS[job].items():
        part = config
        for name in key.split("."):
            part = part.setdefault(name, {})
        part.update(copy.deepcopy(values))
    (folder / "job.yaml").write_text("# name: job\n" + yaml.safe_dump(config))
    if job == "images":
        _write_images(folder / "images")


def _write_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name in ("ant", "bee", "cat"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")


def ranks(job: str) -> int:
    """Returns the number of a job's processes."""
    return int(JOBS[job].get("trainer", {}).get("devices", 1))
