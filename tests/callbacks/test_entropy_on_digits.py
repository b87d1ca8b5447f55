import pytest
import torch
from lightning.pytorch import seed_everything
from tiny_training import trainer

from lightning_n2uq.backbones.blocks import BasicBlock
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.callbacks import EntropyRegularizer
from lightning_n2uq.callbacks._common.quantized_layers import quantized_layers
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.ops.entropy import entropy_bits, hard_histogram

pytestmark = pytest.mark.integration


pytest.importorskip("sklearn", reason="scikit-learn ships the digits")


def mean_entropy(model):
    layers = [(layer.weight_quantizer, layer.weight.detach()) for layer in quantized_layers(model)]
    each = [entropy_bits(hard_histogram(q.codes(weight), q.num_levels)) for q, weight in layers]
    return float(torch.stack(each).mean())


def trained(tmp_path, bits, callbacks):
    seed_everything(0, verbose=False)
    model = QuantizedClassifier(in_channels=1, image_size=8, weight_bits=bits, activation_bits=bits, lr=2e-3)
    model.backbone = ResNet(QuantSpec(bits, bits), BasicBlock, (1, 1, 1), 8, 10, 1, True, False)  # ResNet-8
    runner = trainer(tmp_path, callbacks, max_steps=30)
    runner.fit(model, datamodule=DigitsDataModule())
    return model


@pytest.mark.parametrize("bits", [2, 3])
def test_the_penalty_raises_the_mean_weight_entropy(tmp_path, bits):
    without = mean_entropy(trained(tmp_path, bits, []))
    penalized = mean_entropy(trained(tmp_path, bits, [EntropyRegularizer(10.0)]))
    print(f"W{bits}: {without:.4f} bits without, {penalized:.4f} with the penalty")
    assert without > 0.95 * bits  # the scale alone
    assert bits - penalized < 0.8 * (bits - without)
