"""Convolutions whose sums stay in 16 bits for a while have the sums of int32."""

import numpy as np
import pytest
import torch

from lightning_n2uq.export import ExactNetwork, FastNetwork, describe
from lightning_n2uq.export.ir import steps as s
from lightning_n2uq.export.runtime import torch_engine
from lightning_n2uq.export.runtime.fast import byte_conv
from lightning_n2uq.export.runtime.fast.byte_conv import ByteConvolution
from lightning_n2uq.utils import processor

needs_vectors = pytest.mark.skipif(
    not processor.has_vectors() or processor.adds_bytes_exactly(), reason="for processors without VNNI"
)

WINDOWS = [
    # outputs, channels, kernel, window
    (64, 16, (3, 3), s.Window((1, 1), (1, 1, 1, 1))),
    (7, 5, (3, 3), s.Window((2, 1), (0, 1, 2, 1))),
    (33, 8, (1, 1), s.Window((2, 2))),
    (16, 1, (1, 5), s.Window((1, 3))),
    (9, 12, (2, 3), s.Window((1, 1), (1, 0, 1, 0), (3, 1))),
    (1, 3, (13, 11), s.Window()),
    (17, 130, (3, 3), s.Window((1, 2), (1, 1, 1, 1))),
]


def layer(bits, levels, outputs, channels, kernel, window, extreme=False):
    n = 2**bits - 1
    codes = np.random.default_rng(0).integers(0, n + 1, (outputs, channels // window.groups, *kernel))
    weight = np.full_like(codes, n) if extreme else 2 * codes - n
    return s.IntConv("conv", ("x",), weight.astype(np.int16), bits, True, levels, window)


def codes(levels, channels, count=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, levels + 1, (count, channels, 13, 11), generator=generator, dtype=torch.uint8)
    x[0] = levels
    return x.contiguous(memory_format=torch.channels_last)


def assert_exact(step, x):
    assert ByteConvolution.takes(step)
    found = ByteConvolution(step)(x)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    arrays = torch_engine.tensors(step)
    assert torch.equal(found.int(), torch_engine.run_step(step, arrays, True, x))


@needs_vectors
@pytest.mark.parametrize(("outputs", "channels", "kernel", "window"), WINDOWS)
@pytest.mark.parametrize(("bits", "levels"), [(2, 3), (4, 15), (2, 255)])
def test_any_window_has_exact_sums(bits, levels, outputs, channels, kernel, window):
    assert_exact(layer(bits, levels, outputs, channels, kernel, window), codes(levels, channels))


@needs_vectors
def test_the_largest_sums_do_not_saturate():
    """All codes and all weights at the end of their range, in as few segments as are allowed."""
    for bits in (2, 3, 4):
        step = layer(bits, 2**bits - 1, 16, 512, (3, 3), s.Window((1, 1), (1, 1, 1, 1)), extreme=True)
        assert_exact(step, codes(2**bits - 1, 512, 1))


@needs_vectors
def test_what_16_bits_do_not_hold_is_left_to_others():
    window = s.Window()
    assert not ByteConvolution.takes(layer(8, 255, 4, 16, (3, 3), window))  # levels do not fit a byte
    assert not ByteConvolution.takes(layer(7, 255, 4, 64, (3, 3), window, extreme=True))
    assert not ByteConvolution.takes(layer(2, 3, 4, 4, (3, 3), s.Window(groups=2)))
    assert not ByteConvolution.takes(layer(2, 3, 4, 4, (3, 3), s.Window(dilation=(1, 2))))
    linear = s.IntLinear("fc", ("x",), np.ones((4, 4), np.int16))
    assert not ByteConvolution.takes(linear)


@pytest.mark.parametrize(("outputs", "channels", "kernel", "window"), WINDOWS)
def test_segments_are_as_few_as_the_packed_weights_allow(outputs, channels, kernel, window):
    for bits, levels in ((2, 3), (4, 15), (5, 31), (4, 255)):
        step = layer(bits, levels, outputs, channels, kernel, window)
        expected = None
        for segments in range(max(1, -(-channels * kernel[1] // 4) // byte_conv._SHORTEST), 0, -1):
            packed = np.abs(byte_conv._packed(step.weight, segments).astype(int))
            lanes = packed.reshape(*packed.shape[:-1], 2, 2).sum((3, -1))
            expected = segments if lanes.max() * levels < 2**15 else expected
        assert byte_conv._segments(step) == expected


@needs_vectors
def test_a_network_packs_its_weights_once(small_network, monkeypatch):
    """Plans are made anew after each change of weights."""
    packed, pack = [], byte_conv._packed
    monkeypatch.setattr(byte_conv, "_packed", lambda *given: packed.append(given) or pack(*given))
    FastNetwork(describe(small_network(4, 4, width=16), (2, 32, 32)))
    assert len(packed) == 5


def test_processors_with_vnni_and_others_keep_their_operator(monkeypatch):
    step = layer(2, 3, 4, 4, (3, 3), s.Window())
    with monkeypatch.context() as patch:
        patch.setattr(processor, "adds_bytes_exactly", lambda: True)
        assert not ByteConvolution.takes(step)
    monkeypatch.setattr(processor, "has_vectors", lambda: False)
    assert not ByteConvolution.takes(step)


@needs_vectors
@pytest.mark.parametrize("bits", [2, 4])
def test_a_network_runs_on_them_with_the_same_bits(small_network, bits):
    description = describe(small_network(bits, bits, width=16), (2, 32, 32))
    x = torch.randn(3, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    network, cells = FastNetwork(description), []
    for operation in network.plan.operations:
        if operation.kind == "int_conv":
            cells += [cell.cell_contents for cell in operation.run.__closure__]
    assert sum(isinstance(cell, ByteConvolution) for cell in cells) == 5
    expected = ExactNetwork(description)(x)
    assert torch.equal(network(x), expected)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(network(x), expected)
    finally:
        torch.set_num_threads(threads)
