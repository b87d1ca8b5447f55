"""Trained networks of a study, ready to ship: weights without the state of training, config, figures."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from benchmarks.study import results, table
from benchmarks.study.plan import Run, Study, runs_by_row
from lightning_n2uq.checkpointing import AtomicCheckpointIO

_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "exact_resume")
_NO_PATHS = {"init_from": None, "teacher": None}
_TEXT = """# Networks of the study {name}

Each folder has the last weights of a row's first seed, the config they need and the figures of the run.

    n2uq test --ckpt_path {one}/weights.ckpt --data.root cifar10-images.zip
    n2uq export --ckpt_path {one}/weights.ckpt -o model.onnx
    sha256sum --check SHA256SUMS

{table}
"""


def release(study: Study, folder: Path, output: Path, place: Path) -> list[Path]:
    """Write a folder per row for the first of its seeds that has figures, with a README and digests.

    Args:
        study: The runs.
        folder: Where they left their checkpoints.
        output: Folder of the JSON files of finished runs.
        place: Where the release goes; files of the same names are replaced.

    Returns:
        The folders, none where nothing has finished.

    Raises:
        ValueError: A finished run has left no `last.ckpt` in `folder`.
    """
    made = []
    for _, runs in runs_by_row(study):
        for run in runs:
            figures = results.load(output, study, run)
            if figures is not None:
                made.append(_write(run, folder, results.path_of(output, study, run), place / run.name))
                break
    if made:
        text = _TEXT.format(name=study.name, one=made[-1].name, table=table.markdown(study, output))
        (place / "README.md").write_text(text, encoding="utf-8")
        files = sorted(path for one in made for path in one.iterdir())
        sums = [
            f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(place)}\n" for path in files
        ]
        (place / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return made


def _write(run: Run, folder: Path, figures: Path, place: Path) -> Path:
    last = results.last_checkpoint(folder / run.name)
    place.mkdir(parents=True, exist_ok=True)
    files = AtomicCheckpointIO()
    checkpoint = files.load_checkpoint(last)
    weights = {name: value for name, value in checkpoint.items() if name not in _TRAINING}
    weights["hyper_parameters"] = checkpoint["hyper_parameters"] | _NO_PATHS
    files.save_checkpoint(weights, place / "weights.ckpt")
    saved = yaml.safe_load(last.with_name("config.yaml").read_text(encoding="utf-8"))
    (place / "config.yaml").write_text(yaml.safe_dump(_portable(saved), sort_keys=False), encoding="utf-8")
    (place / "figures.json").write_bytes(figures.read_bytes())
    return place


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """Seed, length, model and data of a config, without paths of the machine that trained it."""
    model, data = dict(config["model"]), dict(config["data"])
    model["init_args"] = model["init_args"] | _NO_PATHS
    if "root" in data.get("init_args", {}):
        data["init_args"] = data["init_args"] | {"root": "data"}
    trainer = {"max_epochs": config["trainer"]["max_epochs"]}
    return {"seed_everything": config["seed_everything"], "trainer": trainer, "model": model, "data": data}
