"""Settings shared by all tests: seeded, bounded, two threads at most."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread per worker: the suite runs as many workers as there are cores, and idle OpenMP threads spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
torch.set_num_threads(1)
settings.register_profile(
    "seeded",
    derandomize=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
