"""Checkpoints that are whole, safe to read and exact to resume from."""

from lightning_n2uq.checkpointing.atomic import AtomicCheckpointIO, CheckpointWriteError
from lightning_n2uq.checkpointing.exact_resume import ExactResume
from lightning_n2uq.checkpointing.model_checkpoint import BestAndLastModelCheckpoint
from lightning_n2uq.checkpointing.reading import DamagedCheckpointError, RefusedCheckpointError, read_file
from lightning_n2uq.checkpointing.search import newest_checkpoint

__all__ = [
    "AtomicCheckpointIO",
    "BestAndLastModelCheckpoint",
    "CheckpointWriteError",
    "DamagedCheckpointError",
    "ExactResume",
    "RefusedCheckpointError",
    "newest_checkpoint",
    "read_file",
]
