"""Jobs of several processes that many tests read: run once for all workers of the suite."""

import os
import pickle

from filelock import FileLock


def run_once(tmp_path_factory, name, make):
    """What ``make()`` returns; the first worker to ask calls it, the others wait and read the answer."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent  # common to all workers
    path = folder / f"{name}.pickle"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
        return pickle.loads(path.read_bytes())
