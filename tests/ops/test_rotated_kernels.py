"""Fast kernels of the rotated codec against the reference: equal bytes, equal bits."""

import itertools

import pytest
import torch
from torch import Tensor

from hard_vectors import hard_vector, same_bits
from lightning_n2uq.ops.backends.common.rng import MessageSeed
from lightning_n2uq.ops.backends.reference.rotated_codec import flips, hadamard
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.formats.rotated_codec import RotatedFormat
from lightning_n2uq.ops.gradient_codec import rotated_decode_mean, rotated_encode

LENGTHS = (0, 1, 7, 8, 9, 63, 64, 65, 403)
FORMS = [(bits, rounding) for bits in (1, 2, 3, 4) for rounding in ("stochastic", "eden")]


def with_ties(numel: int) -> Tensor:
    """A hard vector with exact ties at its end."""
    x = hard_vector(numel)
    if numel > 400:
        x[-16:] = torch.tensor([1.0, -1.0]).repeat(8)
    return x


def run(kernel: str, x: Tensor, form: RotatedFormat, first: int = 0) -> tuple[Tensor, ...]:
    """Payloads, one decoded, the mean of three that may share a rotation, and of three that do not."""
    numel = x.numel()
    with force(kernel):
        rows = torch.zeros(6, form.nbytes(numel) + first, dtype=torch.uint8)
        payloads = rows[:, first:]
        for index in range(3):
            rotated_encode((index + 1) * x, form, MessageSeed(index - 2**63, 7), payloads[index])
            rotated_encode((index + 1) * x, form, index, payloads[3 + index])
        one, mean, several = torch.zeros(3, numel)
        rotated_decode_mean(payloads[:1], form, numel, one)
        rotated_decode_mean(payloads[:3], form, numel, mean)
        rotated_decode_mean(payloads[3:], form, numel, several)
    return rows, one, mean, several


def assert_same(kernel: str, x: Tensor, form: RotatedFormat, first: int = 0) -> None:
    for fast, reference in zip(run(kernel, x, form, first), run("reference", x, form, first), strict=True):
        assert same_bits(fast, reference), (kernel, form, x.numel())


@pytest.mark.parametrize(("bits", "rounding"), FORMS)
def test_numba_gives_the_references_bytes(bits, rounding):
    pytest.importorskip("numba")
    for numel in LENGTHS:
        assert_same("numba", with_ties(numel), RotatedFormat(bits, 64, rounding))
    for size in (8, 16, 32, 128, 256, 512, 1024, 2048):
        assert_same("numba", with_ties(5003), RotatedFormat(bits, size, rounding))


def test_numba_in_the_largest_buckets_and_at_any_byte():
    pytest.importorskip("numba")
    for rounding, size in itertools.product(("stochastic", "eden"), (4096, 32768)):
        assert_same("numba", with_ties(70_001), RotatedFormat(4, size, rounding))
    for first in range(1, 4):
        assert_same("numba", with_ties(403), RotatedFormat(3, 64), first)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_do_not_depend_on_threads(threads):
    pytest.importorskip("numba")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same("numba", with_ties(200_003), RotatedFormat())
    finally:
        torch.set_num_threads(before)


def test_the_transform_is_hadamard_s_matrix():
    size = 64
    matrix = torch.tensor(
        [[(-1.0) ** bin(row & column).count("1") for column in range(size)] for row in range(size)]
    )
    x = torch.randint(-9, 10, (5, size)).float()
    assert torch.equal(hadamard(x), x @ matrix)
    assert torch.equal(hadamard(hadamard(x)), x * size)


def test_signs_are_fair_and_differ_between_buckets():
    signs = flips((1, 2), 3, 200, 1024, torch.device("cpu"))
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert signs.mean().abs() < 4 / (200 * 1024) ** 0.5
    assert (signs.mean(dim=1).abs() < 5 / 32).all()
    assert (signs[1:] * signs[:-1]).mean().abs() < 4 / (199 * 1024) ** 0.5


def test_several_rotations_and_one_have_the_same_mean():
    """Rotating back message by message, or once what was added before: equal but for rounding."""
    form = RotatedFormat(4, 256)
    x = torch.randn(700, generator=torch.Generator().manual_seed(0))
    payloads = torch.zeros(4, form.nbytes(700), dtype=torch.uint8)
    for index, payload in enumerate(payloads):
        rotated_encode(x, form, MessageSeed(index, 5), payload)
    together, apart, one = torch.zeros(3, 700)
    rotated_decode_mean(payloads, form, 700, together)
    for payload in payloads:
        rotated_decode_mean(payload.unsqueeze(0), form, 700, one)
        apart += one / 4
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
