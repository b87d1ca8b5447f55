"""Where in a run an error was raised, told by the code that its traceback passes through."""

from __future__ import annotations

import re
import traceback
from pathlib import PurePath

_LOOPS = {"training_epoch_loop.py", "evaluation_loop.py", "prediction_loop.py"}
_DATA = ("lightning_n2uq.datamodules.", "torch.utils.data.")
_IN_WORKER = re.compile(r"Caught (\w+) in DataLoader worker")


def from_data(error: BaseException) -> bool:
    """Returns whether a data set or its loader raised the error, here or in a worker process."""
    modules = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return bool(_IN_WORKER.search(str(error))) or any(f"{name}.".startswith(_DATA) for name in modules)


def from_restoring(error: BaseException) -> bool:
    """Returns whether the error was raised while the Trainer restored a checkpoint."""
    return any(
        path.name == "checkpoint_connector.py" and name.startswith(("restore", "_restore", "resume"))
        for path, name in _frames(error)
    )


def from_batch(error: BaseException) -> bool:
    """Returns whether the error was raised while a batch was fetched or worked on."""
    return any(path.name in _LOOPS and path.parent.name == "loops" for path, _ in _frames(error))


def lost_worker(error: BaseException) -> bool:
    """Returns whether a loader's worker process was killed, or ended without a word."""
    return isinstance(error, RuntimeError) and bool(re.match(r"DataLoader worker \(pid", str(error)))


def without_worker_traceback(error: BaseException) -> str:
    """Returns an error's own words, which a loader's worker process sends at the end of its traceback."""
    text = str(error)
    found = _IN_WORKER.search(text)
    if found is None:
        return text
    last = list(re.finditer(rf"^(?:[\w.]+\.)?{found.group(1)}: ", text, re.MULTILINE))
    return text[last[-1].end() :] if last else text


def _frames(error: BaseException) -> list[tuple[PurePath, str]]:
    frames = traceback.walk_tb(error.__traceback__)
    return [(PurePath(frame.f_code.co_filename), frame.f_code.co_name) for frame, _ in frames]
