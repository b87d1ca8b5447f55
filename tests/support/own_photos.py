"""Pictures of three kinds that a network tells apart after a few steps, in one folder per class."""

from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {"apple": (200, 40, 40), "leaf": (40, 180, 60), "sky": (60, 90, 220)}


def write_photos(root: Path, count: int, size: tuple[int, int] = (30, 24)) -> Path:
    """Writes `count` JPEG files per class: one colour each, with noise."""
    for seed, (name, colour) in enumerate(KINDS.items()):
        generator = np.random.default_rng(seed)
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.array(colour) + generator.integers(-30, 30, (size[1], size[0], 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{number:03}.jpg")
    return root
