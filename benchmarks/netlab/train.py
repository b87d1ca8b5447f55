"""One rank of the accuracy comparison: trains on the digits with the strategies as users do."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from benchmarks.netlab.network import INTERFACE
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.strategies import TorchHookStrategy

HOSTS = int(os.environ.get("WORLD_SIZE", "1"))  # Lightning removes the variable after its first run
CONFIGS = Path(__file__).parent.parent.parent / "configs" / "digits"
# A third of the digits for testing: with the default tenth one image is more than half a point.
SPLIT = {"batch_size": 32, "val_fraction": 0.05, "test_fraction": 0.3}


class Clock(lightning.Callback):
    """Notes seconds since the first step and test accuracy after every epoch."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []
        self._training = 0.0
        self._since = 0.0

    def on_train_epoch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Start the clock when all ranks are there."""
        trainer.strategy.barrier()
        self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Stop the clock; evaluation is not counted. In the middle of a round ranks have agreed on others."""
        self._training += time.perf_counter() - self._since
        rounds = getattr(trainer.strategy, "rounds", None)
        with rounds.agreed_values() if rounds is not None else contextlib.nullcontext():
            correct = evaluate(trainer)
        self.points.append((self._training, correct))


def evaluate(trainer: lightning.Trainer) -> float:
    """Return the accuracy on all test images in percent; each rank evaluates its share of them."""
    data: DigitsDataModule = trainer.datamodule
    data.setup("test")
    module = trainer.lightning_module.eval()
    hits = total = 0
    with torch.no_grad():
        for images, labels in data.test_dataloader():
            hits += int((module(images).argmax(1) == labels).sum())
            total += len(labels)
    module.train()
    counts = torch.tensor([hits, total])
    torch.distributed.all_reduce(counts)
    return 100.0 * int(counts[0]) / int(counts[1])


def strategy(name: str) -> Strategy:
    """Return a fresh strategy by its registered name; PowerSGD starts early, for runs are short."""
    if name == "ddp_powersgd":
        return TorchHookStrategy(hook="powersgd", powersgd_start=2)
    return StrategyRegistry.get(name)


def train(config: str, method: str, seed: int, epochs: int) -> dict[str, Any]:
    """Train once; return the curve and the kernel's count of bytes sent by this host."""
    settings = yaml.safe_load((CONFIGS / f"{config}.yaml").read_text())["model"]["init_args"]
    lightning.seed_everything(seed, verbose=False)
    module = QuantizedClassifier(num_classes=10, in_channels=1, image_size=8, **settings)
    clock = Clock()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=HOSTS,
        strategy=strategy(method),
        max_epochs=epochs,
        limit_val_batches=0,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    counter = Path(f"/sys/class/net/{INTERFACE}/statistics/tx_bytes")
    before = int(counter.read_text())
    trainer.fit(module, datamodule=DigitsDataModule(seed=seed, **SPLIT))
    sent = int(counter.read_text()) - before
    return {
        "config": config,
        "method": method,
        "seed": seed,
        "curve": clock.points,
        "megabytes": sent / 1e6,
        "steps": trainer.global_step,
    }


def main() -> None:
    """Train every combination, one after the other, and write the curves on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        for config in options.configs:
            for method in options.methods:
                runs.append(train(config, method, seed, options.epochs))
                if torch.distributed.get_rank() == 0:
                    options.output.write_text(json.dumps(runs))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
