"""Made-up scenes: discs, squares and crosses on noise, with the class of every pixel and a box per object."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_n2uq.datamodules._data.counter_rng import generator_seed

CLASS_NAMES = ("background", "disc", "square", "cross")


@dataclass(frozen=True)
class Scenes:
    """Images with what is in them.

    Attributes:
        images: `[N, 3, S, S]` float32, 0 to 1.
        classes: `[N, S, S]` int64, 0 for the background; later objects cover earlier ones.
        boxes: Per image, `[n, 4]` float32: left, top, right, bottom in pixels.
        labels: Per image, `[n]` int64, from 1.
    """

    images: Tensor
    classes: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]


def draw_scenes(count: int, size: int, objects: int, seed: int) -> Scenes:
    """Draws scenes that follow from the seed alone.

    Args:
        count: The number of scenes.
        size: Their height and width in pixels, 16 at least.
        objects: The largest number of objects in one; every scene has one at least.
        seed: The seed; image `i` does not depend on `count`.
    """
    images, classes = torch.empty(count, 3, size, size), torch.zeros(count, size, size, dtype=torch.int64)
    boxes, labels = [], []
    for index in range(count):
        generator = torch.Generator().manual_seed(generator_seed(seed, index))
        images[index] = 0.35 + 0.08 * torch.randn(3, size, size, generator=generator)
        number = int(torch.randint(1, objects + 1, (), generator=generator))
        placed = [_draw(images[index], classes[index], generator) for _ in range(number)]
        boxes.append(torch.tensor([box for box, _ in placed], dtype=torch.float32))
        labels.append(torch.tensor([label for _, label in placed]))
    return Scenes(images.clamp_(0, 1), classes, boxes, labels)


def _draw(image: Tensor, classes: Tensor, generator: torch.Generator) -> tuple[list[int], int]:
    """Draws one object into an image `[3, S, S]` and its class map; returns its box and label."""
    size = classes.shape[0]
    label = int(torch.randint(1, len(CLASS_NAMES), (), generator=generator))
    radius = int(torch.randint(size // 8, size // 4, (), generator=generator))
    row, column = (int(torch.randint(radius, size - radius, (), generator=generator)) for _ in range(2))
    color = 0.5 + 0.5 * torch.rand(3, generator=generator)
    down = (torch.arange(size) - row).abs()[:, None]
    across = (torch.arange(size) - column).abs()[None, :]
    square = (down <= radius) & (across <= radius)
    inside = {
        "disc": down**2 + across**2 <= radius**2,
        "square": square,
        "cross": square & ((down <= radius // 3) | (across <= radius // 3)),
    }[CLASS_NAMES[label]]
    image[:, inside] = color[:, None] + 0.04 * torch.randn(3, int(inside.sum()), generator=generator)
    classes[inside] = label
    return [column - radius, row - radius, column + radius + 1, row + radius + 1], label
