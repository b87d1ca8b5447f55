"""The split convolution on 16-bit integers has the bits of the three float convolutions."""

import numpy as np
import pytest
import torch

from lightning_n2uq.export import ExactNetwork, FastNetwork, describe
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.lower.fixed_point import split_conv
from lightning_n2uq.export.runtime import torch_engine
from lightning_n2uq.export.runtime.fast import groups, layers, plan
from lightning_n2uq.export.runtime.fast.layers import SplitSums
from lightning_n2uq.export.runtime.fast.split_conv import SplitConvolution
from lightning_n2uq.utils import processor

needs_vectors = pytest.mark.skipif(not processor.has_vectors(), reason="the kernel is for AVX2 and AVX-512")

SHAPES = [
    # outputs, channels, kernel, window
    (64, 3, (7, 7), s.Window((2, 2), (3, 3, 3, 3))),
    (16, 3, (3, 3), s.Window((1, 1), (1, 1, 1, 1))),
    (7, 5, (3, 3), s.Window((2, 1), (0, 1, 2, 1))),
    (9, 1, (1, 5), s.Window((1, 3))),
    (8, 16, (2, 3), s.Window((1, 1), (1, 0, 1, 0), (3, 1))),
    (1, 2, (13, 11), s.Window()),
]


def layer(outputs: int, channels: int, kernel: tuple[int, int], window: s.Window) -> s.SplitConv:
    weight = np.random.default_rng(0).normal(size=(outputs, channels // window.groups, *kernel))
    high, low, high_bits, low_bits, _ = split_conv(weight)
    return s.SplitConv("conv", ("x",), high, low, high_bits, low_bits, window)


def images(channels: int, count: int = 3) -> torch.Tensor:
    x = torch.randn(count, channels, 13, 11, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-30
    return x.contiguous(memory_format=torch.channels_last)


def expected(step: s.SplitConv, x: torch.Tensor) -> torch.Tensor:
    return torch_engine.run_step(step, torch_engine.tensors(step), False, x)


@needs_vectors
@pytest.mark.parametrize(("outputs", "channels", "kernel", "window"), SHAPES)
def test_any_window_has_the_bits_of_three_convolutions(outputs, channels, kernel, window):
    step, x = layer(outputs, channels, kernel, window), images(channels)
    assert SplitConvolution.takes(step)
    convolution = SplitConvolution(step)
    found = convolution(x, convolution.scales(x))
    assert torch.equal(found, expected(step, x))
    assert found.is_contiguous(memory_format=torch.channels_last)


@needs_vectors
def test_it_writes_where_it_is_told_to():
    step, x = layer(*SHAPES[0]), images(3)
    convolution = SplitConvolution(step)
    y = torch.empty(4, 64, 7, 6, memory_format=torch.channels_last).fill_(7)
    convolution(x, convolution.scales(x), y[1:])
    assert torch.equal(y[1:], expected(step, x))
    assert (y[0] == 7).all()


@needs_vectors
def test_whatever_a_file_holds_has_the_same_bits():
    """Weights without low parts, or of few bits, as another writer might split them."""
    step = layer(*SHAPES[1])
    for low in (np.zeros_like(step.low), np.rint(step.low * 4) / 4):
        other = s.SplitConv("conv", ("x",), np.rint(step.high / 8), low, 6, 3, step.window)
        convolution, x = SplitConvolution(other), images(3)
        assert torch.equal(convolution(x, convolution.scales(x)), expected(other, x))


@needs_vectors
def test_what_16_bits_do_not_hold_and_other_windows_are_left_to_floats():
    step = layer(*SHAPES[1])
    largest = s.SplitConv("conv", ("x",), step.high * 0 + 2.0**15, step.low, 8, 8, step.window)
    fine = s.SplitConv("conv", ("x",), step.high, step.low + np.float32(2**-24), 8, 8, step.window)
    wide = s.SplitConv("conv", ("x",), np.sign(step.high), step.low, 15, 8, step.window)
    grouped = layer(4, 4, (3, 3), s.Window(groups=4))
    dilated = layer(4, 4, (3, 3), s.Window(dilation=(1, 2)))
    assert not any(map(SplitConvolution.takes, (largest, fine, wide, grouped, dilated)))


def test_other_processors_take_floats(monkeypatch):
    monkeypatch.setattr(processor, "has_vectors", lambda: False)
    step, x = layer(*SHAPES[0]), images(3)
    assert not SplitConvolution.takes(step)
    sums = SplitSums(step)
    high, low = sums.products(x, sums.scales(x)).values()
    scale = sums.scales(x).reshape(-1, 1, 1, 1)
    found = high[:, :64] * scale + (high[:, 64:] * scale + low * scale)
    assert torch.equal(found, expected(step, x))


@pytest.mark.parametrize("imagenet_stem", [True, False])
def test_networks_have_the_same_bits_with_and_without_it(small_network, monkeypatch, imagenet_stem):
    description = describe(small_network(imagenet_stem=imagenet_stem), (2, 32, 32))
    x = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = ExactNetwork(description)(x)
    assert torch.equal(FastNetwork(description)(x), logits)
    for module in (plan, layers):
        monkeypatch.setattr(module.SplitConvolution, "takes", staticmethod(lambda step: False))
    network = FastNetwork(description)
    assert not any(isinstance(group.stem.sums, SplitConvolution) for group in stems(network))
    assert torch.equal(network(x), logits)


def stems(network: FastNetwork) -> list:
    groups = [getattr(operation.run, "__self__", None) for operation in network.plan.operations]
    return [group for group in groups if getattr(group, "stem", None) is not None]


@needs_vectors
@pytest.mark.parametrize("imagenet_stem", [True, False])
def test_a_stem_and_what_follows_it_are_one_operation_on_integers(small_network, imagenet_stem):
    """Also where others read the stem's own value, as in a network without max pooling."""
    network = FastNetwork(describe(small_network(imagenet_stem=imagenet_stem), (2, 32, 32)))
    (stem,) = stems(network)
    assert isinstance(stem.stem.sums, SplitConvolution)
    assert [operation.kind for operation in network.plan.operations].count("split_conv") == 0


@needs_vectors
@pytest.mark.parametrize("value", [0.5, float("nan"), float("inf")])
def test_a_convolution_on_its_own_takes_it_too(value):
    step = layer(*SHAPES[1])
    description = Description((s.Input("x", (), (3, 13, 11)), step))
    x = images(3)
    x[2, 0, 3, 4] = value
    network = FastNetwork(description)
    assert network.plan.alone == []
    np.testing.assert_array_equal(network(x).numpy(), ExactNetwork(description)(x).numpy())


POOLS = [
    s.MaxPool("pool", ("clamp",), (3, 3), s.Window((2, 2), (1, 1, 1, 1))),
    s.MaxPool("pool", ("clamp",), (2, 3), s.Window((2, 1))),
    s.MaxPool("pool", ("clamp",), (2, 2), s.Window((1, 2), (1, 0, 0, 1), (2, 1))),
    s.MaxPool("pool", ("clamp",), (1, 2), s.Window((3, 1), (0, 1, 0, 0))),
]


def pooled(step: s.SplitConv, pool: s.MaxPool) -> Description:
    generator, channels = np.random.default_rng(1), len(step.high)
    scale, shift = generator.normal(size=(2, channels)).astype(np.float32)
    affine = s.Affine("affine", ("conv",), scale, shift)
    slope = np.full(channels, -0.25, np.float32)
    parts = affine, s.PReLU("prelu", ("affine",), slope), s.Clamp("clamp", ("prelu",), -1.0, 4.0)
    return Description((s.Input("x", (), (step.high.shape[1], 13, 11)), step, *parts, pool))


@needs_vectors
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[4]])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_pooled_on_the_way_and_no_map_is_written(monkeypatch, shape, pool, threads):
    description = pooled(layer(*shape), pool)
    network, x = FastNetwork(description), images(shape[1], 5)
    monkeypatch.setattr(groups, "_STEM_VALUES", 2 * x[0].numel())  # two images at a time, and one

    def refuse(*_):
        raise AssertionError("the whole map was written")

    monkeypatch.setattr(SplitConvolution, "__call__", refuse)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = network(x)
    finally:
        torch.set_num_threads(before)
    assert [operation.kind for operation in network.plan.operations] == ["stem"]
    assert torch.equal(found, ExactNetwork(description)(x))


@needs_vectors
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pooled_rows_show_what_is_not_finite(value):
    description, x = pooled(layer(*SHAPES[0]), POOLS[0]), images(3)
    x[2, 0, 3, 4] = value
    np.testing.assert_array_equal(FastNetwork(description)(x).numpy(), ExactNetwork(description)(x).numpy())
