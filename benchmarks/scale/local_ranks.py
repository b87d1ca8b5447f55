"""Bytes of real exchanges between up to 16 processes of this machine, in a network namespace of their own.

Counted twice: where messages are handed to the collectives, and by the kernel at the loopback interface,
which in the namespace carries nothing else. Bytes do not depend on the processor, so the ranks are forked
from one process and run the plain torch codec, whose messages are the same. Needs root.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.netlab.methods import METHODS
from benchmarks.netlab.worker import GradientSource
from lightning_n2uq.ops.dispatch import force

COUNTED = ("nuqsgd", "nuqsgd_2bit", "nuqsgd_all_gather")
_STEPS = 3  # DDP rebuilds its buckets after the first; the last is counted


def loopback_bytes() -> int:
    """Return what the kernel sent over ``lo`` in this network namespace so far, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise RuntimeError("no loopback interface")


def _step(method: str, numel: int) -> dict[str, Any]:
    source = GradientSource(numel, seed=dist.get_rank())
    model = DistributedDataParallel(source)
    state = METHODS[method](model)
    before = 0
    for _ in range(_STEPS):
        dist.barrier()
        before = loopback_bytes()
        model().backward()
        dist.barrier()
    row = {
        "method": method,
        "hosts": dist.get_world_size(),
        "numel": sum(weight.numel() for weight in source.weights),
        "collective_bytes": state.stats.last.sent_bytes,
        "bytes": (loopback_bytes() - before) / dist.get_world_size(),
    }
    dist.barrier()
    state.close()
    return row


def _rank(rank: int, ranks: int, numel: int, folder: str) -> None:
    store = f"file://{Path(folder, 'store')}"
    dist.init_process_group("gloo", store, timedelta(seconds=500), rank=rank, world_size=ranks)
    with force("reference"):
        rows = [_step(method, numel) for method in COUNTED]
    Path(folder, f"rank{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def count(ranks: int, numel: int) -> list[dict[str, Any]]:
    """Return one row per method: bytes per rank, at the collective of the rank that sends most.

    Raises:
        RuntimeError: If a rank fails.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(r, ranks, numel, folder)) for r in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"ranks ended with {[process.exitcode for process in processes]}")
        found = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return [max(rows, key=lambda row: row["collective_bytes"]) for rows in zip(*found, strict=True)]


def volumes(ranks: int, numel: int = 1_000_000) -> list[dict[str, Any]]:
    """Run :func:`count` in a new network namespace.

    Raises:
        RuntimeError: Without root or the tools.
    """
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        raise RuntimeError("counting at the interface needs root, `unshare` and `ip`")
    words = [sys.executable, "-m", "benchmarks.scale.local_ranks", str(ranks), str(numel)]
    inside = "ip link set lo up && exec " + " ".join(words)
    one = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        ["unshare", "--net", "--", "sh", "-c", inside],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | one,
    )
    if done.returncode:
        raise RuntimeError(f"counting between {ranks} ranks ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Count between some ranks and print JSON, one line per number of ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("ranks", type=int, nargs="+")
    parser.add_argument("numel", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for ranks in options.ranks:
        print(json.dumps(count(ranks, options.numel)), flush=True)


if __name__ == "__main__":
    main()
