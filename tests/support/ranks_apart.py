"""One rank of a job whose ranks were started with different arguments; run as a script."""

import json
import os
import sys
from datetime import timedelta

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.strategies import agreement, register_strategies

SHAPE = {"image_size": 8, "in_channels": 1, "num_classes": 4}


class Own(LightningModule):
    """A module whose rate no hyperparameter tells, with its own loader."""

    def __init__(self, lr, batch_size):
        super().__init__()
        self.lr, self.batch_size, self.net = lr, batch_size, torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(64, 4))
        return torch.utils.data.DataLoader(data, self.batch_size)


def main(folder, arguments):
    register_strategies()
    agreement.LONGEST_WAIT = timedelta(seconds=arguments.get("wait", 60))
    trainer = {"max_epochs": 1, "strategy": "nuqsgd", **arguments.get("trainer", {})}
    runner = Trainer(
        default_root_dir=folder, accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), logger=False,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, **trainer,
    )  # fmt: skip
    if "own" in arguments:
        runner.fit(Own(**arguments["own"]))
    else:
        model = {**SHAPE, **arguments.get("model", {})}
        data = {**SHAPE, "batch_size": 8, **arguments.get("data", {})}
        runner.fit(QuantizedClassifier(**model), SyntheticDataModule(**data))
    print("steps", runner.global_step)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
