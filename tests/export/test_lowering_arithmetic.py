"""Fixed-point weights whose sums are exact, affine operations that wait, and signs folded into weights."""

import numpy as np
import pytest

from lightning_n2uq.export.ir.steps import Affine, Clamp, Codes, Input, IntConv, PReLU
from lightning_n2uq.export.lower.deferred import Deferred, directions, evaluate
from lightning_n2uq.export.lower.fixed_point import fixed_linear, split_conv
from lightning_n2uq.export.lower.sign_folding import fold_signs

SHAPES = [(4, 3), (5, 3, 3, 3), (2, 64, 3, 3), (3, 3, 7, 7)]


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Channels of very different magnitudes, the last one zeros."""
    weight = np.random.default_rng(0).normal(size=shape)
    weight *= np.logspace(-3, 2, len(weight)).reshape(-1, *(1,) * (weight.ndim - 1))
    weight[-1] = 0
    return weight


def largest_sum(weight: np.ndarray) -> float:
    return float(np.abs(weight.astype(np.float64)).reshape(len(weight), -1).sum(1).max())


def by_channel(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def is_power_of_two(values: np.ndarray) -> bool:
    return bool((np.frexp(values)[0] == 0.5).all())


@pytest.mark.parametrize("shape", [(4, 3), (7, 100), (3, 20_000)])
def test_fixed_linear_weights_are_close_and_their_sums_exact(shape: tuple[int, ...]) -> None:
    weight = weights(shape)
    integers, bits, scale = fixed_linear(weight)
    assert integers.dtype == np.int32
    assert is_power_of_two(scale)
    assert (np.abs(integers * by_channel(scale, weight) - weight).max(1) <= scale / 2).all()
    assert np.abs(integers).max(1)[:-1].min() > 2**20  # 21 bits are used in every channel
    assert largest_sum(integers) * 2**bits <= 2**53
    assert bits == 24 or largest_sum(integers) * 2 ** (bits + 1) > 2**53


@pytest.mark.parametrize("shape", SHAPES)
def test_split_weights_are_close_and_all_three_sums_exact(shape: tuple[int, ...]) -> None:
    weight = weights(shape)
    high, low, high_bits, low_bits, scale = split_conv(weight)
    assert high.dtype == low.dtype == np.float32
    assert is_power_of_two(scale)
    assert (high == np.rint(high)).all()
    assert np.abs(low).max() <= 0.5
    grid = next(q for q in range(60) if (np.rint(low * 2.0**q) == low * 2.0**q).all())
    error = np.abs((high.astype(np.float64) + low) * by_channel(scale, weight) - weight)
    assert (error <= by_channel(scale, weight) * 2.0 ** -(grid + 1)).all()
    assert grid >= 7
    for sums in (high, low * 2.0**grid):
        assert largest_sum(sums) * 2.0**high_bits <= 2**24
        assert largest_sum(sums) * 2.0**high_bits > 2**21  # what float32 holds is used
    # the input's low part: multiples of 2^-low_bits up to one half
    assert largest_sum(high) * 2.0 ** (low_bits - 1) <= 2**24
    assert low_bits > high_bits


def test_affine_operations_in_a_row_become_one() -> None:
    value = Deferred("x", 2).affine(2.0, [1.0, -1.0]).affine([3.0, -0.5], 0.25)
    (affine,) = value.pending
    assert affine.scale.tolist() == [6.0, -1.0]
    assert affine.shift.tolist() == [3.25, 0.75]
    assert affine.scale.dtype == affine.shift.dtype == np.float64
    x = np.array([[1.0, 2.0], [-1.0, 5.0]])
    assert evaluate(value.pending, x).tolist() == [[9.25, 15.25], [1.75, -4.25]]
    assert (value.base, value.channels, value.bound) == ("x", 2, None)


def test_other_operations_keep_their_place() -> None:
    value = Deferred("x", 2).affine(2.0).prelu([0.5, -1.0]).affine(1.0, 1.0).clamp(0.0, 2.0)
    assert [type(step) for step in value.pending] == [Affine, PReLU, Affine, Clamp]
    assert evaluate(value.pending, np.array([[-1.0, 0.25], [-1.0, 4.0]])).tolist() == [[0, 1.5], [2, 2]]
    assert directions(value.pending, 2).tolist() == [1, 0]
    assert directions(Deferred("x", 2).affine([-1.0, 1.0]).pending, 2).tolist() == [-1, 1]
    assert directions((), 3).tolist() == [1, 1, 1]
    assert [value.ends_affine(), Deferred("x", 1).ends_affine()] == [False, False]
    assert Deferred("x", 1).affine(2.0).ends_affine()


@pytest.mark.parametrize("scale", [1.0, 2.0, [1.0, 2.0]])
def test_a_trailing_shift_comes_off(scale: object) -> None:
    value = Deferred("x", 2).prelu(0.25).affine(scale, [3.0, 4.0])
    rest, shift = value.without_shift()
    assert shift.tolist() == [3, 4]
    x = np.random.default_rng(0).normal(size=(2, 9))
    assert np.array_equal(evaluate(rest.pending, x) + shift[:, None], evaluate(value.pending, x))
    assert rest.ends_affine() is (scale != 1.0)
    for plain in (Deferred("x", 2), Deferred("x", 2).prelu(0.25)):
        same, shift = plain.without_shift()
        assert same is plain
        assert shift.tolist() == [0, 0]


def layer(odd: bool = True) -> IntConv:
    weight = np.array([1, -3, 3, 1], np.int16).reshape(2, 2, 1, 1)
    return IntConv("conv", ("x",), weight, odd=odd)


def codes(name: str, sign: list[int] | None) -> Codes:
    array = None if sign is None else np.array(sign, np.int32)
    return Codes(name, ("conv",), np.zeros((2, 3), np.int32), array)


def fold(*readers: object, odd: bool = True) -> dict[str, object]:
    return {step.name: step for step in fold_signs([Input("x", ()), layer(odd), *readers])}


def test_a_sign_moves_into_the_weights() -> None:
    other = Affine("affine", ("conv",), np.array([2.0, 4.0], np.float32), np.ones(2, np.float32))
    bare = Affine("bare", ("conv",), None, np.ones(2, np.float32))
    found = fold(codes("q", [1, -1]), codes("opposite", [-1, 1]), codes("plain", None), other, bare)
    assert found["conv"].weight.reshape(2, 2).tolist() == [[1, -3], [-3, -1]]
    assert found["conv"].weight.dtype == np.int16
    assert found["q"].sign is None
    assert found["opposite"].sign.tolist() == [-1, -1]
    assert found["plain"].sign.tolist() == [1, -1]
    assert found["plain"].sign.dtype == np.int32
    assert found["affine"].scale.tolist() == [2, -4]
    assert found["affine"].scale.dtype == np.float32
    assert found["affine"].shift.tolist() == [1, 1]
    assert found["bare"].scale.tolist() == [1, -1]


def test_a_sign_stays_where_the_weights_or_a_reader_cannot_take_it() -> None:
    for found in (
        fold(codes("q", [1, -1]), odd=False),
        fold(codes("q", [1, -1]), PReLU("prelu", ("conv",), np.ones(2, np.float32))),
        fold(codes("q", None)),
    ):
        assert np.array_equal(found["conv"].weight, layer().weight)
    assert fold(codes("q", [1, -1]), odd=False)["q"].sign.tolist() == [1, -1]


@pytest.mark.parametrize(("lowest", "folds"), [(-2, False), (-1, True)])
def test_the_lowest_even_level_has_no_negative(lowest: int, folds: bool) -> None:
    weight = np.array([1, 0, lowest, 1], np.int16).reshape(2, 2, 1, 1)
    steps = [Input("x", ()), IntConv("conv", ("x",), weight, odd=False), codes("q", [1, -1])]
    found = {step.name: step for step in fold_signs(steps)}
    assert (found["q"].sign is None) == folds
    assert found["conv"].weight[1].ravel().tolist() == ([-lowest, -1] if folds else [lowest, 1])
