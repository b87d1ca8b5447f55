"""The picture of learned thresholds: which layers it shows, and what it says of other checkpoints."""

from pathlib import Path

import pytest
import torch

from benchmarks import staircase
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import LearnableThresholdQuantizer


def classifier(quantizer: str = "n2uq") -> QuantizedClassifier:
    return QuantizedClassifier(
        num_classes=10,
        in_channels=1,
        image_size=8,
        backbone="resnet20",
        backbone_args={"width": 4},
        activation_quantizer=quantizer,
    )


@pytest.fixture
def moved() -> QuantizedClassifier:
    """Thresholds of one layer in each of two stages have moved, those of another less."""
    torch.manual_seed(0)
    model = classifier().eval()
    quantizers = staircase.quantizers_of(model.backbone)
    with torch.no_grad():
        quantizers["layer1.1.conv1"].widths.mul_(1.5)
        quantizers["layer1.2.conv1"].widths.mul_(1.2)
        quantizers["layer3.0.conv2"].start.add_(0.3)
        quantizers["layer2.0.conv1"].scale_in.mul_(1.1)
    return model


def test_thresholds_move_in_units_of_their_first_distance() -> None:
    quantizer = LearnableThresholdQuantizer(2)
    assert staircase.movement(quantizer) == 0.0
    with torch.no_grad():
        quantizer.start.add_(1 / 3)
    assert staircase.movement(quantizer) == pytest.approx(0.5)
    with torch.no_grad():
        quantizer.start.zero_()
        quantizer.scale_in.mul_(0.5)  # every threshold is twice as far from 0: 1/2, 3/2 and 5/2 distances
    assert staircase.movement(quantizer) == pytest.approx(1.5)


def test_the_layer_that_moved_most_of_each_stage_is_chosen(moved: QuantizedClassifier) -> None:
    quantizers = staircase.quantizers_of(moved.backbone)
    assert staircase.most_moved(quantizers) == ["layer1.1.conv1", "layer2.0.conv1", "layer3.0.conv2"]
    assert staircase.most_moved(quantizers, 1) == ["layer1.1.conv1"]


def test_a_picture_is_drawn_and_the_network_keeps_no_hook(moved: QuantizedClassifier, tmp_path: Path) -> None:
    images = torch.randn(4, 1, 8, 8)
    staircase.draw(moved, images, ["layer1.1.conv1", "layer3.0.conv2"], str(tmp_path / "picture.svg"))
    text = (tmp_path / "picture.svg").read_text()
    assert text.startswith("<?xml")
    assert not any(module._forward_pre_hooks for module in moved.backbone.modules())
    with pytest.raises(ValueError, match=r"layers: got 'layer9', allowed are layer1\.0\.conv1, "):
        staircase.draw(moved, images, ["layer9"], str(tmp_path / "other.svg"))


@pytest.mark.parametrize("name", ["lsq", "n2uq_fixed"])
def test_other_quantizers_have_no_learned_thresholds(name: str) -> None:
    with pytest.raises(ValueError, match="no quantizer with learned thresholds"):
        staircase.quantizers_of(classifier(name).backbone)
