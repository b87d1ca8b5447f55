import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_n2uq.export import describe
from lightning_n2uq.export.runtime.engines import ENGINES
from lightning_n2uq.export.verify.parity import compare, evaluation_engine, float_engine
from lightning_n2uq.modules import QuantizedClassifier

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

DATA = Path(__file__).parents[2].parent / "shared" / "data"


def classifier(x, backbone="resnet20", **options):
    torch.manual_seed(0)
    settings = {"num_classes": 7, "in_channels": x.shape[1], "image_size": x.shape[2]}
    model = QuantizedClassifier(backbone=backbone, **settings, **options)
    with torch.no_grad():
        for _ in range(2):
            model.train().backbone(torch.from_numpy(x))
    return model.eval()


def noise(channels=3, size=16, count=8):
    return np.random.default_rng(0).standard_normal((count, channels, size, size)).astype(np.float32)


def assert_no_code_differs(model, x, names=("torch", "fast", "onnxruntime")):
    """Compares the ordinary evaluation with engines of the exported network, in codes and logits."""
    description = describe(model, x.shape[1:])
    engines = {"evaluation": evaluation_engine(model), **{name: ENGINES[name](description) for name in names}}
    report = compare(engines, [(x, None)], float_engine(model))
    assert report.ok, report.table()
    for tally in report.engines.values():
        assert len(tally.codes) == len(description.quantizers())
        assert tally.logits == 0
    return report


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    "method", [("n2uq", "n2uq"), ("lsq", "lsq"), ("dorefa", "dorefa"), ("dorefa", "pact")]
)
def test_no_code_of_evaluation_differs_from_any_engine(bits, method):
    weight, activation = method
    options = {"weight_bits": bits, "activation_bits": bits, "backbone_args": {"width": 8}}
    model = classifier(noise(), weight_quantizer=weight, activation_quantizer=activation, **options)
    assert_no_code_differs(model, noise())


@pytest.mark.integration
def test_no_code_of_evaluation_differs_from_the_slow_engines():
    pytest.importorskip("qonnx", reason="qonnx is not installed (extra 'export')")
    x = noise(1, 8, 2)
    assert_no_code_differs(classifier(x, backbone_args={"width": 4}), x, ("torch", "numpy", "qonnx"))


@pytest.mark.slow
def test_no_code_of_a_mobilenet_differs():
    x = noise(3, 64, 4)
    assert_no_code_differs(classifier(x, "mobilenet_v2", weight_bits=4, activation_bits=4), x)


@pytest.mark.integration
@pytest.mark.parametrize("bits", [2, 4])
def test_no_code_differs_on_photographs(bits):
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    path = DATA / "cifar10-images.zip"
    if not path.exists():
        pytest.skip("cifar10-images.zip is not in the shared data folder")
    with zipfile.ZipFile(path) as archive:
        names = [n for n in sorted(archive.namelist()) if n.lower().endswith((".jpg", ".jpeg", ".png"))]
        files = [archive.read(name) for name in names[:: len(names) // 16][:16]]
    pixels = np.stack([np.asarray(image_module.open(io.BytesIO(file)).convert("RGB")) for file in files])
    x = np.ascontiguousarray((pixels.transpose(0, 3, 1, 2) / 64 - 2).astype(np.float32))
    model = classifier(x, weight_bits=bits, activation_bits=bits)
    report = assert_no_code_differs(model, x)
    assert report.floating.logits > 0, "the plain float modules round differently"


def test_a_classifier_that_does_not_evaluate_as_deployed_is_left_out():
    assert evaluation_engine(classifier(noise(), integer_evaluation="off")) is None
    assert evaluation_engine(classifier(noise()).backbone) is None
