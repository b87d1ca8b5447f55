"""Starts the ranks of a job that is going to fail, and collects how each of them ended."""

from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import fault_job

import warm


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Job:
    """Ranks as processes of a fork server, which imports torch and Lightning once for all tests.

    Args:
        folder: For checkpoints, progress and output.
        own: What single ranks do differently, by rank: ``arguments``, ``version``, ``network``.
        network: Hosts, one per rank; this machine's loopback if None.
        **arguments: Of ``fault_job.fit``.
    """

    def __init__(self, folder, own=None, network=None, **arguments):
        self.folder = Path(folder)
        for stale in (*self.folder.glob("progress*"), *self.folder.glob("result*")):
            stale.unlink()
        context = warm.context()
        self.processes = []
        port = free_port() if network is None else 29500
        for rank in range(fault_job.WORLD):
            mine = dict((own or {}).get(rank, {}))
            environment = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(fault_job.WORLD),
                "NODE_RANK": "0",
                "LOCAL_RANK": str(rank),
                "OMP_NUM_THREADS": "1",
                "TORCH_CPP_LOG_LEVEL": "ERROR",
            }
            if network is not None:
                mine["network"] = network.hosts[rank]
                environment |= {
                    "MASTER_ADDR": network.address(0),
                    "NODE_RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "GLOO_SOCKET_IFNAME": "eth0",
                }
                arguments["nodes"] = fault_job.WORLD
            target = (rank, str(folder), environment, arguments, mine)
            self.processes.append(context.Process(target=fault_job.rank_main, args=target, daemon=True))

    def __enter__(self):
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.join()

    def pid(self, rank):
        return self.processes[rank].pid

    def progress(self, rank, kind="train"):
        path = self.folder / f"progress{rank}"
        return json.loads(path.read_text())[kind] if path.exists() else 0

    def wait_for(self, count, kind="train", limit=300.0):
        """Wait until every rank has begun ``count`` steps."""
        deadline = time.monotonic() + limit
        while min(self.progress(rank, kind) for rank in range(fault_job.WORLD)) < count:
            assert time.monotonic() < deadline, self.outputs()
            assert all(process.is_alive() for process in self.processes), self.outputs()
            time.sleep(0.02)

    def end(self, ranks, limit):
        """Return the exit codes of ``ranks``, all of which have to end within ``limit`` seconds."""
        deadline = time.monotonic() + limit
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
            assert self.processes[rank].exitcode is not None, f"rank {rank} still runs\n{self.outputs()}"
        return [self.processes[rank].exitcode for rank in ranks]

    def output(self, rank):
        path = self.folder / f"output{rank}"
        return path.read_text() if path.exists() else ""

    def error(self, rank):
        """Return what the rank's last traceback says, from the error's name on."""
        text = self.output(rank)
        found = list(re.finditer(r"^[\w.]+(?:Error|Exception): ", text, re.MULTILINE))
        assert found, f"rank {rank} says no error\n{text[-3000:]}"
        return text[found[-1].start() :]

    def outputs(self):
        return "\n".join(f"--- rank {rank}\n{self.output(rank)[-2500:]}" for rank in range(fault_job.WORLD))

    def results(self):
        return [json.loads((self.folder / f"result{rank}").read_text()) for rank in range(fault_job.WORLD)]


def complete(folder, steps=40, **arguments):
    """Resume from the newest checkpoint of a failed job and check that it finishes with equal replicas."""
    with Job(folder, resume=True, steps=steps, timeout=60.0, **arguments) as job:
        codes = job.end(range(fault_job.WORLD), limit=120.0)
        assert codes == [0] * fault_job.WORLD, job.outputs()
        results = job.results()
    assert len({found["total"] for found in results}) == 1
    assert {found["steps"] for found in results} == {steps}
    assert all(found["start"] for found in results)
