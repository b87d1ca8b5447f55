"""Training steps on two threads beside a busy process, and alone: what threads of OpenMP do while they wait.

    python -m benchmarks.waiting            # medians of 5 processes each, in turn
    python -m benchmarks.waiting --rounds 1

A process is one that trains a ResNet-20 W2A2 (batch 32, 32x32); the policy is read when torch is imported, so
that each figure needs processes of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

POLICIES = ("unset", "passive")
STEPS = """
import time, torch
from lightning_n2uq.modules import QuantizedClassifier
torch.manual_seed(0)
bits = {"weight_bits": 2, "activation_bits": 2}
network = QuantizedClassifier("resnet20", num_classes=10, in_channels=3, image_size=32, **bits).backbone
images, labels = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
for step in range(14):
    if step == 4:
        begin = time.perf_counter()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
print((time.perf_counter() - begin) / 10)
"""


def step(policy: str) -> float:
    """Returns the seconds of a training step under `OMP_WAIT_POLICY`, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": policy}
    if policy == "unset":
        del environment["OMP_WAIT_POLICY"]
    command = [sys.executable, "-c", STEPS]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keeps so many cores busy."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    """Prints the medians, and the ratio to libgomp's own way, which is to spin for a while."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for processes in (0, 1):
        with busy(processes):
            turns = [{policy: step(policy) for policy in POLICIES} for _ in range(rounds)]
        medians = {policy: statistics.median(turn[policy] for turn in turns) for policy in POLICIES}
        ratio = statistics.median(turn["passive"] / turn["unset"] for turn in turns)
        shown = ", ".join(f"{policy} {1e3 * value:.0f} ms" for policy, value in medians.items())
        print(f"{processes} busy processes beside it: {shown}, passive/unset {ratio:.2f}")


if __name__ == "__main__":
    main()
