"""Run by Lightning's own launcher in the tests: every process of the job runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_n2uq.strategies
from lightning_n2uq.callbacks.communication_monitor import CommunicationMonitor
from lightning_n2uq.checkpointing import ExactResume
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.strategies import NUQSGDStrategy


class Small(lightning.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch, _):
        self.net(batch[0])

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data():
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        TensorDataset(torch.randn(64, 32, generator=generator), torch.randint(4, (64,), generator=generator)),
        8,
    )


def trainer(strategy, **arguments):
    return lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        **(
            {
                "max_epochs": 2,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
            }
            | arguments
        ),
    )


def parameters(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit(strategy, module=None, ckpt_path=None, **arguments):
    module = module or Small()
    run = trainer(strategy, **arguments)
    run.fit(module, data(), data(), ckpt_path=ckpt_path)
    return run, module


class Readings(lightning.Callback):
    """Keeps what was logged last under `comm/`."""

    def __init__(self):
        self.last = {}

    def on_train_batch_end(self, trainer, *_):
        metrics = trainer.callback_metrics
        self.last.update({k: float(v) for k, v in metrics.items() if k.startswith("comm/")})


def save(found, folder):
    """Writes what this rank has found, and leaves the process group."""
    torch.save(found, Path(folder, f"rank{torch.distributed.get_rank()}.pt"))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


MODES = {
    "automatic": {},
    "manual": {"manual": True},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "accumulate": {"accumulate_grad_batches": 2},
    "arguments": {
        "find_unused_parameters": True,
        "gradient_as_bucket_view": True,
        "bucket_cap_mb": 0.001,
    },
}
OF_DDP = ("find_unused_parameters", "gradient_as_bucket_view", "bucket_cap_mb")


def modes():
    """Parameters after two epochs: by 4 bits, by the exchange without loss, and by Lightning's own DDP."""
    found = {}
    for name, arguments in MODES.items():
        ddp = {key: value for key, value in arguments.items() if key in OF_DDP}
        others = {key: value for key, value in arguments.items() if key not in (*ddp, "manual")}
        found[name] = {"steps": 0}
        for kind, strategy in {
            "4 bits": NUQSGDStrategy(**ddp),
            "without loss": NUQSGDStrategy(warmup_steps=1 << 20, **ddp),
            "ddp": DDPStrategy(process_group_backend="gloo", **ddp),
        }.items():
            run, module = fit(strategy, Small("manual" in arguments), **others)
            found[name][kind] = parameters(module)
            if kind == "without loss":
                found[name]["steps"] = run.strategy.state.step
    found["powersgd"] = {"parameters": parameters(fit("ddp_powersgd")[1])}
    for stage in ("validate", "test"):
        getattr(trainer("nuqsgd"), stage)(Small(), data(), verbose=False)
    return found


def resume(folder):
    """Stop after one epoch, go on from the checkpoint, and compare with what was saved."""
    settings = {"bits": 8, "levels": "float", "error_feedback": True, "bucket_size": 64, "min_numel": 16}
    saver = ModelCheckpoint(dirpath=folder, filename="half", save_top_k=-1)
    owed = {}

    class Reader(lightning.Callback):
        def on_train_end(self, trainer, module):
            owed.update(trainer.strategy.state.state_dict()["owed"])

    first, _ = fit(
        NUQSGDStrategy(**settings), max_epochs=1, enable_checkpointing=True, callbacks=[saver, Reader()]
    )
    first.strategy.barrier()
    saved = torch.load(Path(folder) / "half.ckpt", weights_only=True)["nuqsgd"]
    column = saved["names"].index("net.0.weight")
    kept = saved["first_leg"].split(saved["numels"], dim=1)[column][first.global_rank]
    shared = saved["second_leg"].split(saved["numels"])[column]
    own, mean = (leg["net.0.weight"] for leg in owed["legs"])
    second, module = fit(NUQSGDStrategy(**settings), ckpt_path=str(Path(folder) / "half.ckpt"))
    return {
        "own residual": (own, kept),
        "own chunk": (mean, shared),
        "steps": [saved["step"], second.strategy.state.step],
        "parameters": parameters(module),
    }


class Digits(Small):
    """For images of a data module that knows where it was: a plain loader begins its epoch anew."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def amid_accumulation(folder):
    """Go on from a validation between accumulated batches, where each rank has gradients of its own."""
    path = Path(folder) / "amid.ckpt"

    class Saver(lightning.Callback):
        def on_validation_end(self, trainer, module):
            if trainer.global_step == 0:
                trainer.save_checkpoint(path)

    def ends(*callbacks, ckpt_path=None):
        lightning.seed_everything(0, verbose=False)
        run = trainer(
            NUQSGDStrategy(error_feedback=True, min_numel=16, gradient_as_bucket_view=True),
            callbacks=[ExactResume(), ModelCheckpoint(folder, save_top_k=0), *callbacks],
            enable_checkpointing=True,
            default_root_dir=folder,
            accumulate_grad_batches=3,
            val_check_interval=2,
            num_sanity_val_steps=0,
            limit_train_batches=4,
            limit_val_batches=1,
        )
        module = Digits()
        run.fit(module, DigitsDataModule(batch_size=8, num_workers=0), ckpt_path=ckpt_path)
        return parameters(module)

    found = {"whole": ends(Saver()), "resumed": ends(ckpt_path=path)}
    kept = torch.load(path, weights_only=True)["exact_resume"]["ranks"]
    return found | {"gradient": kept[torch.distributed.get_rank()]["gradients"]["net.1.weight"]}


def monitored():
    monitor, readings = CommunicationMonitor(every_n_steps=2), Readings()
    fit("nuqsgd", callbacks=[monitor, readings])
    return {"metrics": readings.last, "summary": monitor.summary}


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    assert lightning_n2uq.strategies
    found = {"modes": modes(), "resume": resume(folder), "monitored": monitored()}
    save(found | {"amid accumulation": amid_accumulation(folder)}, folder)


if __name__ == "__main__":
    main()
