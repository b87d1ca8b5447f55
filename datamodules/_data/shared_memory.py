"""Whether a loader's worker processes have room for their batches: they travel through shared memory.

Where it is too small (containers give 64 MB unless told otherwise), a worker dies of a bus error or waits for
ever. Both of torch's sharing strategies put tensors there, so that only loading without workers avoids it.
"""

import os
import warnings

FOLDER = "/dev/shm"
_AHEAD = 2  # batches that DataLoader asks each worker for in advance


def workers_with_room(workers: int, batch_bytes: int, folder: str = FOLDER) -> int:
    """Returns `workers`, or 0 with a warning where their batches do not fit into shared memory.

    Args:
        workers: The wanted number of processes.
        batch_bytes: The size of a batch.
        folder: Where the system keeps shared memory; without such a folder it has another place.
    """
    if not workers or not os.path.isdir(folder):
        return workers
    state = os.statvfs(folder)
    free, needed = state.f_bavail * state.f_frsize, (_AHEAD * workers + 1) * batch_bytes
    if free >= needed:
        return workers
    warnings.warn(
        f"num_workers: got {workers}, which need {_megabytes(needed)} of shared memory, but {folder} has "
        f"{_megabytes(free)} free: images are loaded without worker processes, which may be slow "
        "(containers: docker run --shm-size)",
        RuntimeWarning,
        stacklevel=2,
    )
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
