"""What annealing and the entropy callbacks do to accuracy and entropy: trains the runs of docs/callbacks.md.

    python -m benchmarks.callback_study digits --blocks 1 --epochs 30
    python -m benchmarks.callback_study cifar10 --zip cifar10-images.zip --blocks 1 --epochs 5 --images 5000
    python -m benchmarks.callback_study shipped --seeds 0 1 2 3 4 5
    python -m benchmarks.callback_tables                             # shows the stored runs; trains nothing

The second reads a zip of JPEG files laid out `train/<class>/*.jpg`, `test/<class>/*.jpg`. Accuracy is that of
the last weights (nothing is selected), on validation and test images together, with the staircase. The third
trains packaged configs through the `n2uq` command; there it is the best checkpoint's, on the test images.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import time
import warnings
import zipfile

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from benchmarks import digits_table
from lightning_n2uq.backbones.blocks import BasicBlock
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.callbacks import EntropyRegularizer, RangeInitialization, ThresholdAnnealing
from lightning_n2uq.callbacks._common.quantized_layers import quantized_layers
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.ops.entropy import entropy_bits, hard_histogram

CONFIGS = digits_table.ROOT / "configs" / "digits"
ANNEALING = "--trainer.callbacks+=ThresholdAnnealing --trainer.callbacks.end"
RANGES = "ranges from data"
VARIANTS = {
    "none": lambda: [],
    "annealing": lambda: [ThresholdAnnealing(0.0, 0.5)],
    "annealing over the first quarter": lambda: [ThresholdAnnealing(0.0, 0.25)],
    "annealing, input to output": lambda: [ThresholdAnnealing(0.0, 0.5, order="input_to_output")],
    "annealing, frozen for the last 10 %": lambda: [ThresholdAnnealing(0.0, 0.5, freeze_after=0.9)],
    "annealing, ramp gradient": lambda: [ThresholdAnnealing(0.0, 0.5, gradient="ramp")],
    "bits 8, 4, 2": lambda: [ThresholdAnnealing(0.0, 0.0, bits=(8, 4, 2), bits_at=(0, 0.25, 0.5))],
    "entropy penalty 10": lambda: [EntropyRegularizer(10.0)],
    "annealing and penalty 10": lambda: [ThresholdAnnealing(0.0, 0.5), EntropyRegularizer(10.0)],
    "without rescaling": lambda: [EntropyRegularizer(no_rescale=("*",))],
    "without rescaling, penalty 10": lambda: [EntropyRegularizer(10.0, no_rescale=("*",))],
    RANGES: lambda: [RangeInitialization()],
}


PENALTY = "--trainer.callbacks+=EntropyRegularizer"
SHIPPED = {
    "`digits/n2uq_w2a2`": ("n2uq_w2a2", ""),
    "`digits/n2uq_w2a2_annealed` (annealing over the first fifth, monitor)": ("n2uq_w2a2_annealed", ""),
    "the same without the monitor": ("n2uq_w2a2", f"{ANNEALING}=0.2"),
    "annealing over the first half, no monitor": ("n2uq_w2a2", f"{ANNEALING}=0.5"),
    "first fifth, penalty 1": (
        "n2uq_w2a2",
        f"{ANNEALING}=0.2 {PENALTY} --trainer.callbacks.weight=1.0",
    ),
    "penalty 10 alone": ("n2uq_w2a2", f"{PENALTY} --trainer.callbacks.weight=10.0"),
}
"""Packaged configs, and what the command adds to them."""


class CIFARFromZip(LightningDataModule):
    """A balanced part of CIFAR-10 in memory, flipped at random in training."""

    def __init__(self, path: str, train_images: int, test_images: int = 2000, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        with zipfile.ZipFile(path) as archive:
            self.train = _read(archive, "train/", train_images)
            self.test = _read(archive, "test/", test_images)

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """The held-out images in order."""
        return DataLoader(self.test, 250)

    def on_after_batch_transfer(self, batch, index):
        """Flips training images at random and normalizes."""
        images, labels = batch
        flip = torch.rand(len(images)) < 0.5 if self.trainer.training else torch.zeros(len(images)).bool()
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return (images.float() - 120.0) / 64.0, labels


def _read(archive: zipfile.ZipFile, part: str, count: int) -> TensorDataset:
    names = sorted(n for n in archive.namelist() if part in n and n.endswith(".jpg"))
    classes = sorted({n.split("/")[-2] for n in names})
    per_class = count // len(classes)
    chosen = [n for c in classes for n in [m for m in names if m.split("/")[-2] == c][:per_class]]
    images = [np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in chosen]
    labels = [classes.index(n.split("/")[-2]) for n in chosen]
    return TensorDataset(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels))


def run_shipped(variant: str, seed: int) -> dict:
    """Trains and tests a packaged config with more callbacks."""
    config, more = SHIPPED[variant]
    found = digits_table.run(config, str(CONFIGS / f"{config}.yaml"), seed, more.split())
    accuracies = {"accuracy": found["test_acc"], "best_val_acc": found["best_val_acc"]}
    return {"variant": variant, "bits": 2, "seed": seed, **accuracies, "seconds": found["seconds"]}


def run(variant: str, seed: int, options: argparse.Namespace) -> dict:
    """Trains one variant and measures what it ended with."""
    bits, epochs, width, blocks = options.bits, options.epochs, options.width, options.blocks
    data: LightningDataModule = DigitsDataModule(seed=seed)
    if options.data == "cifar10":
        data = CIFARFromZip(options.zip, options.images)
    seed_everything(seed, verbose=False)
    channels, size = (1, 8) if isinstance(data, DigitsDataModule) else (3, 32)
    model = QuantizedClassifier(
        "resnet20",
        in_channels=channels,
        image_size=size,
        weight_bits=bits,
        activation_bits=bits,
        lr=2e-3,
        backbone_args={"width": width},
    )
    if blocks != 3:  # ResNet-8 (1 block per stage) or ResNet-14 (2)
        model.backbone = ResNet(
            QuantSpec(bits, bits), BasicBlock, (blocks,) * 3, width, 10, channels, True, False
        )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=VARIANTS[variant](),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **quiet,
    )
    begin = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - begin
    entropies = [_entropy(layer.weight_quantizer, layer.weight.detach()) for layer in quantized_layers(model)]
    return {
        "variant": variant,
        "bits": bits,
        "seed": seed,
        "accuracy": _accuracy(model, data),
        "entropy": sum(entropies) / len(entropies),
        "lowest_entropy": min(entropies),
        "seconds": seconds,
    }


def _entropy(quantizer, weight: torch.Tensor) -> float:
    return float(entropy_bits(hard_histogram(quantizer.codes(weight), quantizer.num_levels)))


@torch.no_grad()
def _accuracy(model: QuantizedClassifier, data: LightningDataModule) -> float:
    model.eval()
    if isinstance(data, DigitsDataModule):
        held_out = DataLoader(ConcatDataset([data.load_split("val"), data.load_split("test")]), 64)
    else:
        held_out = data.val_dataloader()
    right = total = 0
    for batch in held_out:
        images, labels = batch if isinstance(data, DigitsDataModule) else _normalized(batch)
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return right / total


def _normalized(batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return (batch[0].float() - 120.0) / 64.0, batch[1]


def main() -> None:
    """Runs the chosen variants and appends a line of JSON for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=["digits", "cifar10", "shipped"])
    parser.add_argument("--zip")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=3, help="residual blocks per stage; 3: ResNet-20")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--variants", nargs="*", help="default: all")
    parser.add_argument("--out", default="callback_study.jsonl")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for variant in options.variants or (SHIPPED if options.data == "shipped" else VARIANTS):
            result = run_shipped(variant, seed) if options.data == "shipped" else run(variant, seed, options)
            with open(options.out, "a") as file:
                file.write(json.dumps({"data": options.data, **result}) + "\n")
            print(result, flush=True)


if __name__ == "__main__":
    main()
