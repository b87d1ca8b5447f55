"""Run by Lightning's own launcher in the tests of `nuqsgd_fsdp`: every process of the job runs this file."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # of a script it is the folder

from exchange_jobs import trainer_script
from exchange_jobs.trainer_script import Readings, data, save
from lightning_n2uq.callbacks import CommunicationMonitor, NonFiniteGuard, QuantizeModel
from lightning_n2uq.callbacks._guard import checks
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.strategies import NUQSGDStrategy, ShardedNUQSGDStrategy
from lightning_n2uq.summary import weigh

IMAGES = {"image_size": 8, "in_channels": 1, "num_classes": 4}


class Small(trainer_script.Small):
    """Shards itself, unless it is told not to."""

    def __init__(self, sharded=True):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.sharded = sharded

    def configure_model(self):
        if self.sharded and self.device_mesh is not None:
            policy = getattr(self.trainer.strategy, "mp_policy", None)
            options = {"mesh": self.device_mesh["data_parallel"], **({"mp_policy": policy} if policy else {})}
            fully_shard(self.net[2], **options)
            fully_shard(self.net, **options)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def trainer(strategy, **arguments):
    return trainer_script.trainer(strategy, **({"max_epochs": 1} | arguments))


def fit(strategy, module=None, **arguments):
    return trainer_script.fit(strategy, module or Small(), **({"max_epochs": 1} | arguments))


def shards(module):
    for part in (module.net[2], module.net):
        part.reshard()  # Lightning's strategy leaves it gathered after a validation
    return torch.cat([p.to_local().detach().flatten() for p in module.parameters()])


MODES = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


def modes():
    """Parameters after an epoch: by 4 bits, without loss, and by Lightning's own FSDP2."""
    found = {}
    for name, arguments in MODES.items():
        found[name] = {}
        for kind, strategy in {
            "4 bits": ShardedNUQSGDStrategy(param_bits=8),
            "without loss": ShardedNUQSGDStrategy(warmup_steps=1 << 20),
            "fsdp": ModelParallelStrategy(2, 1, process_group_backend="gloo"),
        }.items():
            if kind == "4 bits" and name != "plain":
                continue
            run, module = fit(strategy, **arguments)
            found[name][kind] = shards(module)
            if kind == "without loss":
                found[name]["steps"] = run.strategy.state.step
    _, module = fit(ShardedNUQSGDStrategy(param_dtype="bfloat16"))
    found["bf16"] = {"parameters": shards(module)}
    for stage in ("validate", "test"):
        getattr(trainer("nuqsgd_fsdp"), stage)(Small(), data(), verbose=False)
    return found


def resume(folder):
    """Stop after one epoch of two, go on from the checkpoint, a file or a folder."""
    found = {}
    settings = {"param_bits": 8, "bucket_size": 64, "min_numel": 16}
    _, straight = fit(ShardedNUQSGDStrategy(**settings), max_epochs=2)
    for name, distributed in (("file", False), ("folder", True)):
        saver = ModelCheckpoint(dirpath=folder, filename=name, save_top_k=-1)
        options = settings | {"save_distributed_checkpoint": distributed}
        first, _ = fit(
            ShardedNUQSGDStrategy(**options), max_epochs=1, enable_checkpointing=True, callbacks=[saver]
        )
        first.strategy.barrier()
        path = Path(folder, f"{name}.ckpt")
        second, module = fit(ShardedNUQSGDStrategy(**options), ckpt_path=str(path), max_epochs=2)
        found[name] = {
            "steps": second.strategy.state.step, "folder": path.is_dir(),
            "parameters": (shards(straight), shards(module)),
        }  # fmt: skip
    saved = torch.load(Path(folder, "file.ckpt"), weights_only=True)
    found["entry"] = saved["nuqsgd_fsdp"]
    plain = Small()
    plain.load_state_dict(saved["state_dict"])
    return found


def monitored():
    monitor, readings = CommunicationMonitor(every_n_steps=2), Readings()
    fit(ShardedNUQSGDStrategy(param_bits=8), callbacks=[monitor, readings])
    return {"metrics": readings.last, "summary": monitor.summary}


def classifier(folder):
    """The package's own module shards itself; its checkpoint is an ordinary one."""
    found = {}
    for quantizer in ("n2uq", "lsq"):
        lightning.seed_everything(0, verbose=False)
        model = QuantizedClassifier(
            backbone_args={"width": 8}, weight_quantizer=quantizer, activation_quantizer=quantizer, **IMAGES
        )
        run = trainer(
            ShardedNUQSGDStrategy(param_bits=8), limit_val_batches=2, limit_train_batches=3,
            callbacks=[NonFiniteGuard(every_n_steps=1)],
        )  # fmt: skip
        run.fit(model, SyntheticDataModule(batch_size=8, **IMAGES))
        broken = collapse(model)
        path = str(Path(folder, f"{quantizer}.ckpt"))
        run.save_checkpoint(path)
        run.strategy.barrier()
        again = QuantizedClassifier.load_from_checkpoint(path, map_location="cpu")
        local = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
        found[quantizer] = {
            "loss": float(run.callback_metrics["val/loss"]),
            "same": all(torch.equal(p, local[name]) for name, p in again.named_parameters()),
            "steps": torch.tensor([float(p.sum()) for n, p in local.items() if n.endswith("step")]),
            "parts": sum(type(part).__name__.startswith("FSDP") for part in model.modules()),
            "broken": broken,
            "weighed": weighed(model) == (weigh(again), 0),
            "guard": [[look(one) for look in LOOKS] for one in (model, again)],
        }
    return found


class Collectives(TorchDispatchMode):
    """Counts them; torch's `CommDebugMode` has hooks, with which layers train in floats."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what its shards go through comes here, too
        self.count += "c10d" in function.namespace
        return function(*args, **(kwargs or {}))


def weighed(model):
    """The sizes of a network, and the collectives that it took; `run.json` is written on one rank."""
    with Collectives() as collectives:
        return weigh(model), collectives.count


LOOKS = (checks.collapsed_widths, checks.collapsed_scales, checks.degenerate_weights)


@torch.no_grad()
def collapse(model):
    """Loses the range of a weight and of a scale; returns their names."""
    named = dict(model.named_parameters())
    weight = next(name for name, p in named.items() if p.dim() == 4)
    scale = next(name for name in named if name.rpartition(".")[2] in ("scale_in", "step"))
    for name in (weight, scale):
        named[name].to_local().zero_()
    return weight, scale


def quantized():
    """A float module quantized by the callback, ranges fitted together by both ranks."""
    found = {}
    for batches in (1, 0):
        module = Small()
        fit(
            ShardedNUQSGDStrategy(), module, max_steps=2,
            callbacks=[QuantizeModel({"weight_bits": 4, "activation_bits": 4}, calibration_batches=batches)],
        )  # fmt: skip
        scales = {n: p.full_tensor().detach() for n, p in module.named_parameters() if "scale_in" in n}
        found[batches] = torch.cat([value.flatten() for value in scales.values()])
    return found


def refused():
    found = {}
    for name, strategy, module in (
        ("not sharded", ShardedNUQSGDStrategy(), Small(sharded=False)),
        ("ranks", ShardedNUQSGDStrategy(tensor_parallel_size=3), Small()),
        ("one copy", ShardedNUQSGDStrategy(hsdp=True), Small()),
    ):
        found[name] = message_of(strategy, module)
    module = Small()
    fully_shard(module.net, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    module.sharded = False
    found["wrong strategy"] = message_of(NUQSGDStrategy(), module)
    return found


def message_of(strategy, module):
    try:
        fit(strategy, module)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "no error"


def main():
    folder = sys.argv[1]
    torch.set_num_threads(1)
    found = {
        "modes": modes(),
        "resume": resume(folder),
        "monitored": monitored(),
        "classifier": classifier(folder),
        "quantized": quantized(),
        "refused": refused(),
    }
    save(found, folder)


if __name__ == "__main__":
    main()
