"""What a run has measured of itself, as `CommunicationMonitor` logs it and `n2uq advise` reads it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightning_n2uq.checkpointing.reading import read_file

PREFIX, ERRORS = "comm/", "comm/error_of/"
_HOW = "allowed is a run with --trainer.callbacks+=CommunicationMonitor"


@dataclass(frozen=True)
class Measured:
    """Figures of one run; numbers that it could not measure are 0.

    Attributes:
        ranks: The ranks of the run.
        ranks_per_node: Those of a node.
        coordinates: Gradient coordinates that are averaged.
        exact: Those of them that travel in full precision: 1-D and small parameters.
        step_s: Seconds of a step, evaluation not counted.
        sync_s: Seconds from the first gradient handed over to the last one returned, in one exchange.
        period: Optimizer steps between two exchanges.
        encode_s: Seconds of encoding in one exchange.
        decode_s: Seconds of decoding in one exchange.
        sent_bytes: Bytes that a rank sends in one exchange.
        link_mbit: The speed of the link in Mbit/s, as fp32 all-reduces see it.
        latency_s: Seconds of one step of a collective without bytes.
        relative_error: Squared error of the messages sent, relative to what they were about.
        spread: A rank's squared gradient over that of the mean gradient.
        errors: Squared error of one message about this run's gradient, relative to it, by codec.
    """

    ranks: int = 1
    ranks_per_node: int = 1
    coordinates: int = 0
    exact: int = 0
    step_s: float = 0.0
    sync_s: float = 0.0
    period: int = 1
    encode_s: float = 0.0
    decode_s: float = 0.0
    sent_bytes: float = 0.0
    link_mbit: float = 0.0
    latency_s: float = 0.0
    relative_error: float = 0.0
    spread: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def of(metrics: Mapping[str, float], source: str) -> Measured:
        """Returns the figures under `comm/`.

        Args:
            metrics: Logged values by name; the last one of each.
            source: Where they are from, for the error message.

        Raises:
            ValueError: The monitor did not log there.
        """
        values: dict[str, Any] = {}
        for one in fields(Measured):
            value = metrics.get(PREFIX + one.name)
            if value is not None and math.isfinite(value):
                values[one.name] = int(value) if one.type == "int" else value
        if not values.get("coordinates") or not values.get("step_s"):
            raise ValueError(f"run: {source!r} holds no figures of CommunicationMonitor, {_HOW}")
        errors = {name.removeprefix(ERRORS): v for name, v in metrics.items() if name.startswith(ERRORS)}
        return Measured(**values, errors=errors)


def of_run(folder: str) -> Measured:
    """Reads the figures of a run's `metrics.csv`.

    Raises:
        ValueError: There is no such run, or the monitor did not log in it.
    """
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        raise ValueError(f"run: got {folder!r}, allowed is the folder of a run, with its metrics.csv")
    last: dict[str, float] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key.startswith(PREFIX):
                    last[key] = float(value)
    return Measured.of(last, folder)


def of_checkpoint(path: str) -> Measured:
    """Reads the figures that the monitor keeps in a checkpoint.

    Raises:
        ValueError: There is no such file, or it holds none.
    """
    callbacks = read_file(path, "ckpt_path", mmap=True).get("callbacks", {})
    found = [state for name, state in callbacks.items() if name.startswith("CommunicationMonitor")]
    return Measured.of(found[0].get("figures", {}) if found else {}, path)
