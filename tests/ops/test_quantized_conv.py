"""`quantized_conv2d` as a custom operator, and tables that quantize as the uniform methods do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_n2uq.ops.dispatch import load, select
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters
from lightning_n2uq.ops.fused_conv import Geometry
from lightning_n2uq.ops.quantized_conv import LeveledWeight, quantized_conv2d
from lightning_n2uq.ops.tables import QuantizerParameters
from lightning_n2uq.ops.uniform import METHODS, UniformParameters, _ends_are_inside, _tables
from lightning_n2uq.ops.weight import apply_scale, quantize_weight_with_scale, weight_levels

pytest.importorskip("numba")
CPU = torch.device("cpu")
GEOMETRY = Geometry((2, 1), (1, 1), (1, 1), 2)


def plain_codes(method: str, x: Tensor, size: Tensor, offset: Tensor, n: int) -> Tensor:
    if method.startswith("lsq"):
        return torch.round(((x - offset) / size).clamp(0, n))
    if method.startswith("pact"):
        return torch.round(torch.where(x >= size, size, x.clamp_min(0)) / (size / n))
    return torch.round(x.clamp(0, 1) * n)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    size=st.floats(2.0**-20, 2.0**20, width=32),
    offset=st.floats(-128, 128, width=32),
)
def test_tables_quantize_as_the_method_does(method: str, bits: int, size: float, offset: float) -> None:
    n, width, shift = (
        2**bits - 1,
        torch.tensor([size]),
        torch.tensor([offset if method == "lsq_plus" else 0.0]),
    )
    given_size = None if method == "dorefa" else width
    tables = UniformParameters(method, bits, given_size, shift if method == "lsq_plus" else None).tables(
        torch.float32
    )
    thresholds = tables.thresholds
    infinite = torch.tensor(torch.inf)
    x = torch.cat(
        [
            torch.randn(200) * float(width) * n,
            thresholds,
            torch.nextafter(thresholds, infinite),
            torch.nextafter(thresholds, -infinite),
            torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf]),
        ]
    )
    codes = (x[:, None] > thresholds).sum(1)
    expected = plain_codes(method, x, width, shift, n)
    assert torch.equal(codes.float(), expected)
    step = {"dorefa": None, "pact": width / n, "pact_published": width / n}.get(method, width)
    levels = expected / n if step is None else expected * step + shift
    assert torch.equal(tables.outputs[codes], levels)
    merged = torch.stack([tables.knots[:-1], thresholds, tables.knots[1:]])
    assert (merged[0] <= merged[1]).all()
    assert (merged[1] <= merged[2]).all()


def test_the_ends_of_a_range_are_torchs_also_inside_an_operator() -> None:
    x = torch.tensor([0.0, 1.0], requires_grad=True)
    x.clamp(0, 1).sum().backward()
    found = []

    @torch.library.custom_op("lightning_n2uq_tests::ends", mutates_args=())
    def ends(x: Tensor) -> Tensor:
        _ends_are_inside.cache_clear()
        found.append(_ends_are_inside())
        return x.clone()

    with torch.no_grad():
        ends(x)
    assert found == [bool(x.grad[0])]
    assert x.grad[0] == x.grad[1]


def test_tables_of_a_step_are_kept() -> None:
    _tables.cache_clear()
    for _ in range(3):
        UniformParameters("lsq", 4, torch.tensor([0.37])).tables(torch.float32)
    assert _tables.cache_info().misses == 1


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_levels_times_scale_are_the_quantized_weight(bits: int, backend: str) -> None:
    weight = torch.randn(6, 5, 3, 3)
    weight[2] = 0.0
    levels, scale = weight_levels(weight, bits, backend)
    quantized, expected_scale = quantize_weight_with_scale(weight, bits)
    n = 2**bits - 1
    assert torch.equal(scale, expected_scale)
    assert torch.equal(levels.float() * (scale / n), quantized)
    assert torch.equal(quantized, apply_scale(weight, scale, bits))
    assert (levels.abs() % 2 == 1).all()


def arguments(norm: bool, uniform: bool, known: bool) -> tuple[object, ...]:
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    channels = [torch.rand(4, requires_grad=True) for _ in range(5)]
    quantizer = torch.zeros(1), torch.full((3,), 2 / 3), torch.ones(1), torch.tensor([0.7])
    slots = (torch.tensor([0.1]), None, None, torch.tensor([0.4])) if uniform else quantizer
    method = ("lsq_plus", 2) if uniform else ("n2uq", 2)
    levels, step = torch.randint(-3, 4, (6, 2, 3, 3), dtype=torch.int8), torch.rand(6)
    weight = torch.randn(6, 2, 3, 3, requires_grad=True)
    own = (weight, 2, False, None, None) if known else (weight, 0, False, levels, step)
    chain = (channels[0], channels[1], 1e-5, *channels[2:]) if norm else (None, None, 0.0, None, None, None)
    backends = "numba", select("integer", CPU)
    bias = torch.randn(6, requires_grad=True)
    return (x, *chain, *slots, *method, *own, bias, *map(list, GEOMETRY[:3]), 2, torch.float32, *backends)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm: bool, known: bool) -> None:
    operator = torch.ops.lightning_n2uq.quantized_conv2d.default
    torch.library.opcheck(operator, arguments(norm, False, known))


def test_an_offset_is_not_added_where_the_map_is_padded() -> None:
    """Levels of one, an offset of one, codes of zero: the sum counts the taps that lie inside."""
    uniform = UniformParameters("lsq_plus", 2, torch.tensor([1.0]), torch.tensor([1.0]))
    weight = LeveledWeight(
        torch.ones(1, 1, 3, 3), 0, False, torch.ones(1, 1, 3, 3, dtype=torch.int8), torch.ones(1)
    )
    geometry, x = Geometry((1, 1), (1, 1), (1, 1), 1), torch.full((1, 1, 4, 4), -9.0)
    backends = "numba", select("integer", CPU)
    y, _ = quantized_conv2d(x, None, None, uniform, weight, None, geometry, torch.float32, backends)
    assert y[0, 0].tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]


@pytest.mark.parametrize("with_nan", [False, True])
def test_nothing_of_a_float_map_is_kept(with_nan: bool) -> None:
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    if with_nan:
        with torch.no_grad():
            x[0, 0, 0, 0] = torch.nan
    quantizer = QuantizerParameters(torch.zeros(1), torch.full((3,), 2 / 3), torch.ones(1), torch.ones(1))
    norm = NormParameters(torch.ones(8), torch.zeros(8), 1e-5)
    act = PReLUParameters(torch.zeros(8), torch.ones(8) / 4, torch.zeros(8))
    weight = LeveledWeight(torch.randn(8, 8, 3, 3, requires_grad=True), 2)
    kept: list[Tensor] = []
    backends = "numba", select("integer", CPU)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y, _ = quantized_conv2d(
            x,
            norm,
            act,
            quantizer,
            weight,
            None,
            Geometry((1, 1), (1, 1), (1, 1), 1),
            torch.float32,
            backends,
        )
    packed = load("packed_activation", CPU, "numba").packed_shape(x, 2)
    own = {x.data_ptr(), weight.weight.data_ptr()}
    floats = sum(t.nbytes for t in kept if t.data_ptr() not in own)
    assert floats <= torch.Size(packed).numel() + 1000
    assert y.isnan().any() == with_nan
