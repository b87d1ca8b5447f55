"""Read a run's own files: metrics, snapshots of the quantizers, confusion matrices, config."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_n2uq.report.layer_record import LayerRecord
from lightning_n2uq.utils.nested import flatten

METRICS, CONFIG = "metrics.csv", "config.yaml"

SNAPSHOTS = "quantization.jsonl"
"""One line per epoch: `{"step", "epoch", "layers": [LayerRecord, ..]}`."""

CONFUSION = "confusion.json"
"""`{"val": matrix, "test": matrix}`, rows are true classes; the last evaluation of each."""

RECORD = "run.json"
"""What `n2uq fit` writes of a run: version, revision, parameters, bytes, data set, class names, seconds."""

CLASS_NAMES = "class_names"
"""Beside the matrices of `confusion.json` and in `run.json`: names in the order of the classes' numbers."""

EPOCH = "epoch"
_KNOWN = (METRICS, SNAPSHOTS, CONFUSION)
_STEP_COLUMNS = ("step", EPOCH)


@dataclass(frozen=True)
class Series:
    """One metric over optimizer steps.

    Attributes:
        steps: Increasing optimizer steps.
        values: The metric at each step, finite or NaN.
    """

    steps: list[int]
    values: list[float]

    @property
    def last(self) -> float:
        """Returns the last value."""
        return self.values[-1]

    def thinned(self, most: int = 2000) -> Series:
        """Returns at most `most` evenly spaced points, and the last one."""
        stride = -(-len(self.steps) // most)
        if stride <= 1:
            return self
        return Series([*self.steps[::stride], self.steps[-1]], [*self.values[::stride], self.values[-1]])


@dataclass(frozen=True)
class Snapshot:
    """All quantized layers by name, at one optimizer step."""

    step: int
    epoch: int
    layers: dict[str, LayerRecord]


@dataclass(frozen=True)
class Run:
    """What is known of a run; what its folder does not hold is empty.

    Attributes:
        folder: The run's folder.
        name: A name that is unique among the runs of a page.
        metrics: Series by metric name.
        snapshots: What `QuantizationMonitor` wrote, in order.
        confusion: Confusion matrices by stage.
        config: The text of the run's YAML.
        settings: The same as one mapping with dotted keys.
        record: What `run.json` holds.
        class_names: The names of the classes in the order of their numbers.
        epochs: The epoch of each step at which training or validation logged.
    """

    folder: Path
    name: str
    metrics: dict[str, Series] = field(default_factory=dict)
    snapshots: list[Snapshot] = field(default_factory=list)
    confusion: dict[str, list[list[float]]] = field(default_factory=dict)
    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)
    epochs: dict[int, int] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, LayerRecord]:
        """Returns the layers of the last snapshot."""
        return self.snapshots[-1].layers if self.snapshots else {}


_EVALUATION = re.compile(r".*-(test|validate|predict)(-\d+)?")
MOST_RUNS = 40


def runs_below(folder: Path) -> list[Path]:
    """Returns the folder itself if it is a run's, else the runs below it in the order of their paths.

    Folders of `n2uq test`, `validate` and `predict` count only where they are named themselves.

    Raises:
        ValueError: More lie below it than a page shows.
    """
    if not folder.is_dir() or any((folder / file).is_file() for file in (*_KNOWN, CONFIG)):
        return [folder]
    places = {path.parent for file in _KNOWN for path in folder.rglob(file)}
    found = sorted(place for place in places if not _EVALUATION.fullmatch(place.name))
    if len(found) > MOST_RUNS:
        raise ValueError(
            f"run_dir: got {str(folder)!r} with {len(found)} runs below it, allowed are {MOST_RUNS} on a page"
        )
    return found or [folder]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads runs and gives each a name by which it differs from the others.

    Raises:
        ValueError: A folder is missing, or holds none of a run's files, or one that cannot be read.
    """
    return [_read(folder, name) for folder, name in zip(folders, unique_names(folders), strict=True)]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest tails of the paths that differ from each other; equal paths get a number.

    They have two parts at least: the config's name and the time, as `n2uq fit` names its folders.
    """
    parts = [folder.resolve().parts for folder in folders]
    for count in range(2, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({i + 1})" for i, folder in enumerate(folders)]


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"run_dir: no such folder {str(folder)!r}")
    if not any((folder / file).is_file() for file in _KNOWN):
        raise ValueError(
            f"run_dir: {str(folder)!r} holds no run, expected {METRICS}, {SNAPSHOTS} or {CONFUSION}"
        )
    try:
        metrics, epochs = _read_metrics(folder / METRICS)
        confusion, record = (dict(json.loads(_text(folder / file) or "{}")) for file in (CONFUSION, RECORD))
        names = confusion.pop(CLASS_NAMES, None) or record.get(CLASS_NAMES) or []
        snapshots, config = _read_snapshots(folder / SNAPSHOTS), _text(folder / CONFIG)
        settings = _settings(config)
        classes = list(map(str, names))
        return Run(folder, name, metrics, snapshots, confusion, config, settings, record, classes, epochs)
    except (
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
        csv.Error,
    ) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"run_dir: cannot read the files of {str(folder)!r} ({reason})") from error


def _settings(config: str) -> dict[str, Any]:
    """Returns a config as one mapping with dotted keys; an empty one where it is no YAML."""
    try:
        return flatten(yaml.safe_load(config) or {})
    except yaml.YAMLError:
        return {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _read_metrics(path: Path) -> tuple[dict[str, Series], dict[int, int]]:
    """Returns the columns of the CSV logger's file, and the epochs by step.

    Cells are empty where a metric was not logged.
    """
    if not path.is_file():
        return {}, {}
    points: dict[str, dict[int, float]] = {}
    epochs: dict[int, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(row["step"])
            trained = any(value and key.startswith(("train/", "val/")) for key, value in row.items() if key)
            if trained and (epoch := row.get(EPOCH)):
                epochs[step] = int(epoch)
            for key, value in row.items():
                if value and key not in _STEP_COLUMNS:
                    points.setdefault(key, {})[step] = _number(value)
    series = {key: Series(sorted(p), [p[step] for step in sorted(p)]) for key, p in points.items()}
    return series, epochs


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else math.nan


def _read_snapshots(path: Path) -> list[Snapshot]:
    """Returns snapshots in order: of repeated steps the later one, without a last line that was cut short."""
    by_step: dict[int, dict[str, Any]] = {}
    lines = _text(path).splitlines()
    for i, line in enumerate(lines):
        try:
            snapshot = json.loads(line)
        except ValueError:
            if i == len(lines) - 1:  # the run was killed while writing it
                break
            raise
        by_step[snapshot["step"]] = snapshot
    return [_snapshot(by_step[step]) for step in sorted(by_step)]


def _snapshot(values: dict[str, Any]) -> Snapshot:
    layers = map(LayerRecord.from_dict, values["layers"])
    return Snapshot(values["step"], values["epoch"], {layer.name: layer for layer in layers})
