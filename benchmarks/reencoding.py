"""What JPEG costs a trained network: ``python -m benchmarks.reencoding CHECKPOINT cifar10-images.zip``.

The images of the archive are JPEG files (quality 75, colours at half resolution) of images that were never
compressed, which are not at hand. Its test images are therefore encoded once more and the accuracy on both is
compared. On the same grid of blocks a second encoding finds almost the same coefficients and changes next to
nothing; moved by four pixels, half a block, it loses about what the first one did.
"""

from __future__ import annotations

import argparse
import io
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from lightning_n2uq.datamodules import CIFAR10DataModule
from lightning_n2uq.modules import QuantizedClassifier

QUALITY = 75
MOVED = 4  # pixels, half a block


class Comparison(NamedTuple):
    """Accuracies in percent, and what changed.

    Attributes:
        images: The number of test images.
        before: Accuracy on the archive's images.
        after: Accuracy on the same images, encoded once more.
        changed: Share of images in percent whose predicted class changed.
        error: Root of the mean squared difference of pixels, 0 to 255.
    """

    images: int
    before: float
    after: float
    changed: float
    error: float


def encode_again(pixels: Tensor, quality: int = QUALITY, moved: int = MOVED) -> Tensor:
    """JPEG and back, as the archive was made.

    Args:
        pixels: `[N, 3, H, W]` uint8.
        quality: Of the encoder, 1 to 95.
        moved: Pixels by which the grid of blocks is moved, to the right and down; the rim is repeated there.

    Returns:
        The decoded pixels, of the same shape, uint8.
    """
    framed = functional.pad(pixels.float(), (moved, 0, moved, 0), mode="replicate").to(torch.uint8)
    return torch.stack([_through_jpeg(image, quality) for image in framed])[:, :, moved:, moved:]


def _through_jpeg(image: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality, subsampling="4:2:0")
    decoded = torch.frombuffer(bytearray(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8)
    return decoded.reshape(image.shape[1], image.shape[2], 3).permute(2, 0, 1)


@torch.no_grad()
def compare(model: QuantizedClassifier, data: CIFAR10DataModule) -> Comparison:
    """Evaluates a classifier on the test images as they are and encoded once more."""
    model.eval()
    data.setup("test")
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (data.statistics.mean, data.statistics.std))
    hits, again_hits, changed, squares, count = 0, 0, 0, 0.0, 0
    for images, labels in data.test_dataloader():
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        again = encode_again(pixels)
        first = model(images).argmax(1)
        second = model((again / 255 - mean) / std).argmax(1)
        hits += int((first == labels).sum())
        again_hits += int((second == labels).sum())
        changed += int((first != second).sum())
        squares += float((again.float() - pixels.float()).square().mean()) * len(labels)
        count += len(labels)
    share = 100 / count
    return Comparison(count, hits * share, again_hits * share, changed * share, (squares / count) ** 0.5)


def main() -> None:
    """Compares and prints one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("root", help="folder or .zip, as CIFAR10DataModule takes it")
    options = parser.parse_args()
    model = QuantizedClassifier.from_checkpoint(options.checkpoint, "checkpoint")
    found = compare(model, CIFAR10DataModule(root=options.root, batch_size=500))
    print(
        f"{found.images} test images: {found.before:.2f} % as they are, {found.after:.2f} % encoded once "
        f"more ({found.after - found.before:+.2f}); {found.changed:.2f} % of the predictions change, "
        f"pixels by {found.error:.2f} of 255 (root mean square)"
    )


if __name__ == "__main__":
    main()
