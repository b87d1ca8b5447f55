"""Whole networks on real photographs; skipped where the files are not at hand."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_n2uq import backbones
from lightning_n2uq.export import describe
from lightning_n2uq.export.runtime.engines import ENGINES
from lightning_n2uq.export.verify.parity import compare, float_engine

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

DATA = Path(__file__).parents[2].parent / "shared" / "data"
MEAN, STD = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def photographs(archive: str, count: int, size: int) -> np.ndarray:
    """The first images of a zip file, resized and cropped to a square, normalized, `[N, 3, size, size]`."""
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    path = DATA / archive
    if not path.exists():
        pytest.skip(f"{archive} is not in the shared data folder")
    images = []
    with zipfile.ZipFile(path) as file:
        names = [name for name in sorted(file.namelist()) if name.lower().endswith((".jpg", ".jpeg"))]
        for name in names[:: max(len(names) // count, 1)][:count]:
            image = image_module.open(io.BytesIO(file.read(name))).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize((size, size))
            images.append((np.asarray(image, np.float32) / 255 - MEAN) / STD)
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))


def assert_parity(name, bits, x, engines, perturb, batch):
    torch.manual_seed(0)
    model = perturb(backbones.build(name, weight_bits=bits, activation_bits=bits))
    with torch.no_grad():
        model.train()(torch.from_numpy(x[:16]))  # norms that fit the images
    description = describe(model.eval(), x.shape[1:])
    batches = [(x[i : i + batch], None) for i in range(0, len(x), batch)]
    chosen = {engine: ENGINES[engine](description) for engine in engines}
    report = compare(chosen, batches, float_engine(model))
    print(report.table())
    assert report.ok, report.table()


@pytest.mark.integration
def test_resnet20_on_cifar_images(perturb):
    x = photographs("cifar10-images.zip", 16, 32)
    assert_parity("resnet20", 2, x, ("torch", "numpy", "onnxruntime"), perturb, 16)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_resnet20_on_cifar_images_in_all_engines(perturb, bits):
    pytest.importorskip("qonnx", reason="qonnx is not installed (extra 'export')")
    x = photographs("cifar10-images.zip", 200, 32)
    assert_parity("resnet20", bits, x, tuple(ENGINES), perturb, 50)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_resnet18_on_imagenet_images_in_all_engines(perturb, bits):
    pytest.importorskip("qonnx", reason="qonnx is not installed (extra 'export')")
    x = photographs("imagenet-sample.zip", 50, 224)
    assert_parity("resnet18", bits, x, tuple(ENGINES), perturb, 10)
