"""Run by torchrun: rank 2 is killed once, then the job goes on from the newest checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import fault_job
import torch


class KilledOnce(fault_job.Progress):
    """Kills rank 2 at its twelfth step, on the first start only."""

    def on_train_batch_start(self, trainer, *rest):
        super().on_train_batch_start(trainer, *rest)
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_rank == 2 and trainer.global_step == 12:
            os.kill(os.getpid(), signal.SIGKILL)


def main():
    folder, rank = sys.argv[1], int(os.environ["RANK"])
    torch.set_num_threads(1)
    fault_job.Progress = KilledOnce
    found = fault_job.fit(folder, rank, steps=30, timeout=20.0, resume=True)
    found["restarts"] = os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(folder, f"result{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
