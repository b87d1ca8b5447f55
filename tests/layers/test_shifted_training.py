"""Converted convolutions train on packed codes: values and gradients of the plain path, less kept."""

import contextlib
import copy
import weakref

import pytest
import torch
from torch import nn

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.layers import fused
from lightning_n2uq.ops.dispatch import force


def network(**options):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, **options), nn.Flatten()]
    model = nn.Sequential(*layers, nn.LazyLinear(4))
    model(torch.zeros(2, 3, 12, 12))
    quantize_model(model, {"weight_bits": 2, "activation_bits": 2})
    model[3].activation_quantizer.set_range(torch.tensor(-0.3), torch.tensor(1.7))
    return model


def gradients(model, x):
    y = model(x)
    y.square().sum().backward()
    return y, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": (2, 0), "stride": 2, "bias": False},
        {"padding": 1, "groups": 8},
        {"dilation": 2, "groups": 2},
    ],
    ids=["padded", "strided", "depthwise", "dilated"],
)
def test_values_and_gradients_are_those_of_the_plain_path(options, monkeypatch):
    model = network(**options)
    plain, x = copy.deepcopy(model), torch.randn(4, 3, 12, 12)
    taken = []
    original = fused._fused_conv
    monkeypatch.setattr(fused, "_fused_conv", lambda *given: taken.append(1) or original(*given))
    y, got = gradients(model, x)
    assert taken
    with force("reference"):
        expected, wanted = gradients(plain, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("kept", [False, True])
def test_the_shifted_map_is_not_kept_and_codes_are(monkeypatch, kept):
    model, x = network(padding=1), torch.randn(4, 3, 12, 12)
    maps = []
    original = fused.packed_activation

    def noting(inside, *rest):
        y, packed, stats = original(inside, *rest)
        maps.extend([weakref.ref(inside), weakref.ref(y)])
        noting.packed = packed
        return y, packed, stats

    monkeypatch.setattr(fused, "packed_activation", noting)
    monkeypatch.setattr(fused, "integer_backend", lambda conv, x: "reference")
    if kept:  # the test sees it where it is kept
        monkeypatch.setattr(fused, "recomputed", lambda *_: contextlib.nullcontext())
    loss = model(x).square().sum()
    assert maps
    assert noting.packed.numel() * noting.packed.element_size() <= 4 * 8 * 10 * 10 // 4 + 64
    assert [ref() is not None for ref in maps] == [kept, False]
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_map_changed_in_place_is_an_error():
    model = network(padding=1)
    x = torch.randn(4, 8, 10, 10, requires_grad=True)
    inside = x * 1
    y = model[3](inside)
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
