"""Silences messages of Lightning that tell a user of this command nothing, each for a stated reason."""

import logging
import os
import warnings

# Adverts for other products, and facts that the config states or that are not the user's to change.
_UNWANTED_LOGS = (
    "Tip: For seamless",
    "Seed set to",
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "to estimate number of stepping batches",
)
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)
_UNWANTED_WARNINGS = (
    # Data sets held in memory are fastest without worker processes.
    r".*does not have many workers which may be a bottleneck.*",
    # A small data set has fewer batches than log_every_n_steps; epochs are logged all the same.
    r".*The number of training batches .* is smaller than the logging interval.*",
    # Every run has a folder of its own; it exists because config.yaml is in it.
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*The dirpath has changed from .*",
    # Checkpoints are written at the end of an epoch and data order follows from seed and epoch.
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    # Whoever asks for barebones has asked for no logs.
    r".*You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`.*",
    # Lightning walks nested loaders with a check that newer torch versions deprecate.
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
)


def _wanted(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _UNWANTED_LOGS)


def quiet_lightning() -> None:
    """Installs the filters; calling it again changes nothing."""
    # Lightning calls its parser's methods by their older names.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _wanted not in logger.filters:
            logger.addFilter(_wanted)
    for message in _UNWANTED_WARNINGS:
        warnings.filterwarnings("ignore", message)
