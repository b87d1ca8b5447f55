"""What scales of weights cost: their errors, and that only weights change."""

import pytest
import torch
from torch import nn

from benchmarks import weight_scales
from lightning_n2uq.modules import QuantizedClassifier


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_best_scale_has_the_error_of_the_best_even_levels(bits: int) -> None:
    """Max, "Quantizing for minimum distortion", 1960: the best equidistant levels of a normal variable."""
    known = {2: 0.1188, 3: 0.0374, 4: 0.0115}[bits]
    errors = {
        name: weight_scales.relative_error(q, 200_000) for name, q in weight_scales.choices(bits).items()
    }
    assert errors["least_error"] == pytest.approx(known, rel=0.02)
    assert errors["n2uq"] > errors["least_error"]
    assert errors["lsq"] > errors["least_error"]


def test_the_entropy_preserving_scale_falls_behind_as_bits_grow() -> None:
    ratios = []
    for bits in (2, 3, 4):
        quantizers = weight_scales.choices(bits)
        own, best = (weight_scales.relative_error(quantizers[x], 200_000) for x in ("n2uq", "least_error"))
        ratios.append(own / best)
    assert ratios == pytest.approx([1.16, 1.88, 4.2], rel=0.03)


def test_the_table_has_a_row_per_width_and_scale_and_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    float_network = {"weight_bits": 32, "activation_bits": 32}
    float_network |= {"weight_quantizer": "float", "activation_quantizer": "float"}
    model = QuantizedClassifier(
        num_classes=10,
        in_channels=3,
        image_size=8,
        backbone="resnet20",
        backbone_args={"width": 4},
        **float_network,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(torch.randn(20, 3, 8, 8), torch.randint(0, 10, (20,)))]
    rows = weight_scales.table(model, batches, batches, (2, 4)).splitlines()
    assert len(rows) == 2 + 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    twin = weight_scales.with_weights(model, weight_scales.by_method("least_error", 2))
    first, second, *_ = (m for m in twin.backbone.modules() if isinstance(m, nn.Conv2d))
    assert torch.equal(first.weight, before["backbone.conv1.weight"])
    assert len(second.weight[0].unique()) <= 4
