"""The residual networks: shapes, names, gradients, compilation."""

import pytest
import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.layers import QuantConv2d
from small_networks import resnet8


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (17, 2), (32, 3)])
def test_resnet20_takes_any_size_from_8_and_any_channel_count(size: int, channels: int) -> None:
    model = backbones.resnet20(in_channels=channels, num_classes=7)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("quantize_downsample", [True, False])
def test_what_is_quantized(quantize_downsample: bool) -> None:
    model = backbones.resnet20(quantize_downsample=quantize_downsample)
    quantized = [m for m in model.modules() if isinstance(m, QuantConv2d)]
    assert len(quantized) == 18 + 2 * quantize_downsample
    assert type(model.conv1) is nn.Conv2d
    assert type(model.fc) is nn.Linear
    assert type(model.layer2[0].downsample[0]) is (QuantConv2d if quantize_downsample else nn.Conv2d)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_imagenet_networks_have_torchvisions_names_and_shapes(name: str) -> None:
    import torchvision

    ours = backbones.build(name).state_dict()
    theirs = getattr(torchvision.models, name)(weights=None).state_dict()
    assert set(theirs) <= set(ours)
    assert all(ours[key].shape == value.shape for key, value in theirs.items())


@pytest.mark.integration
@pytest.mark.parametrize("name", ["n2uq", "lsq"])
def test_fullgraph_compile_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    model = resnet8(weight_quantizer=name, activation_quantizer=name, width=8)
    x = torch.randn(4, 3, 16, 16)
    model(x)  # first values of LSQ's steps, batch-norm statistics
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    compiled(x).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(x).sum().backward()
    for n, p in model.named_parameters():
        assert torch.allclose(grads[n], p.grad, rtol=1e-4, atol=1e-4), n


@pytest.mark.integration
def test_learning_reduces_the_loss() -> None:
    model = backbones.resnet20(num_classes=4, in_channels=1, width=8)
    x = torch.randn(32, 1, 8, 8)
    target = torch.arange(32) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_wrong_names_values_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"backbone: got 'resnet21', allowed are .*resnet18, "):
        backbones.build("resnet21")
    with pytest.raises(ValueError, match="num_clases"):
        backbones.build("resnet20", num_clases=3)
    with pytest.raises(ValueError, match="num_classes: got 0"):
        backbones.build("resnet20", num_classes=0)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 8, 8\), allowed is \[N, 3, H, W\]"):
        backbones.build("resnet20")(torch.zeros(2, 1, 8, 8))
