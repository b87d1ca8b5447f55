"""`threshold_quantize` as docs/numerics.md says: values at thresholds, finite differences, edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_n2uq.ops import reference, threshold_codes, threshold_quantize
from lightning_n2uq.ops.tables import WIDTH_FLOOR, threshold_tables


def parameters(bits: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """Start, widths, scale_in, scale_out away from their first values."""
    generator = torch.Generator().manual_seed(seed)
    n = 2**bits - 1
    widths = 2 / n * (0.4 + 1.2 * torch.rand(n, generator=generator, dtype=torch.float64))
    start = torch.tensor([0.1], dtype=torch.float64)
    scale_in = torch.tensor([1.3], dtype=torch.float64)
    scale_out = torch.tensor([0.7], dtype=torch.float64)
    return [p.to(dtype) for p in (start, widths, scale_in, scale_out)]


def inputs_away_from_knots(bits: int, parameters: list[Tensor], count: int = 400) -> Tensor:
    """Inputs over both flat ends and every segment, none within 1e-3 of a knot."""
    tables = threshold_tables(*parameters, torch.float64)
    x = torch.linspace(-1.0, 3.0, count, dtype=torch.float64) / parameters[2]
    distance = (x[:, None] * parameters[2] - tables.knots).abs().amin(1)
    return x[distance > 1e-3]


def h(x: Tensor, start: Tensor, widths: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
    """The surrogate, written as a sum of clamped ramps: another form than the reference's."""
    knots = torch.cat([start, start + torch.cumsum(widths, 0)])
    ramps = ((x[..., None] * scale_in - knots[:-1]) / widths).clamp(0, 1)
    return scale_out * 2 / widths.numel() * ramps.sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("argument", range(4))
def test_gradients_equal_finite_differences_of_the_surrogate(bits: int, argument: int) -> None:
    params = parameters(bits)
    arguments = [inputs_away_from_knots(bits, params), *params]
    upstream = torch.linspace(-1, 2, arguments[0].numel(), dtype=torch.float64)
    leaves = [a.clone().requires_grad_() for a in arguments]
    (grad,) = torch.autograd.grad(threshold_quantize(*leaves), leaves[argument], upstream)
    step = 1e-6
    for i in range(arguments[argument].numel()):
        up, down = [a.clone() for a in arguments], [a.clone() for a in arguments]
        up[argument].view(-1)[i] += step
        down[argument].view(-1)[i] -= step
        expected = ((h(*up) - h(*down)) * upstream).sum() / (2 * step)
        assert abs(grad.view(-1)[i] - expected) <= 1e-6 * max(1.0, abs(expected))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_scale_gradient_uses_the_forward_value(bits: int) -> None:
    params = parameters(bits)
    x = inputs_away_from_knots(bits, params)
    beta = params[3].clone().requires_grad_()
    y = threshold_quantize(x, *params[:3], beta)
    (grad,) = torch.autograd.grad(y.sum(), beta)
    assert torch.allclose(grad, (y.detach() / params[3]).sum(), rtol=1e-12)
    # Away from the levels the surrogate differs from the staircase, so that the two sums differ.
    assert abs(grad - (h(x, *params) / params[3]).sum()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_at_above_and_below_every_threshold(bits: int, dtype: torch.dtype) -> None:
    start, widths, _, scale_out = parameters(bits, dtype)
    one = torch.ones(1, dtype=dtype)
    thresholds = threshold_tables(start, widths, one, scale_out, dtype).thresholds
    n = widths.numel()
    lowest, highest = torch.tensor(-torch.inf, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)
    step = scale_out.double() * 2 / n
    below = threshold_quantize(torch.nextafter(thresholds, lowest), start, widths, one, scale_out)
    at = threshold_quantize(thresholds, start, widths, one, scale_out)
    above = threshold_quantize(torch.nextafter(thresholds, highest), start, widths, one, scale_out)
    k = torch.arange(n, dtype=torch.float64)
    exact = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0}
    assert torch.allclose(below, (k * step).to(dtype), **exact)
    assert torch.equal(at, below)
    assert torch.allclose(above, ((k + 1) * step).to(dtype), **exact)
    assert torch.equal(above[:-1], below[1:])


def test_thresholds_follow_the_definition() -> None:
    start, widths, scale_in, scale_out = parameters(3)
    knots = start + torch.cat([torch.zeros(1, dtype=torch.float64), torch.cumsum(widths, 0)])
    tables = threshold_tables(start, widths, scale_in, scale_out, torch.float64)
    assert torch.allclose(tables.knots, knots, rtol=1e-15)
    assert torch.allclose(tables.thresholds, knots[:-1] + widths / 2, rtol=1e-15)


def test_width_at_the_floor_is_used_as_the_floor_and_gets_no_gradient() -> None:
    start, widths, scale_in, scale_out = parameters(2)
    widths = torch.tensor([WIDTH_FLOOR, -5.0, 0.8], dtype=torch.float64, requires_grad=True)
    tables = threshold_tables(start, widths, scale_in, scale_out, torch.float64)
    assert torch.allclose(tables.knots.diff()[:2], torch.full((2,), WIDTH_FLOOR, dtype=torch.float64))
    x = torch.linspace(-1, 2, 101, dtype=torch.float64)
    threshold_quantize(x, start, widths, scale_in, scale_out).sum().backward()
    assert widths.grad[0] == 0
    assert widths.grad[1] == 0
    assert widths.grad[2] != 0


@pytest.mark.parametrize("ramp", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_operator_equals_the_reference_with_autograd(bits: int, ramp: float) -> None:
    params = [p.requires_grad_() for p in parameters(bits)]
    x = torch.randn(5, 7, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    fast = threshold_quantize(x, *params, ramp=ramp)
    slow = reference.threshold_quantize_ste(x, *params, ramp=ramp)
    assert torch.allclose(fast, slow, rtol=1e-14, atol=1e-15)
    leaves = [x, *params]
    for a, b in zip(
        torch.autograd.grad(fast, leaves, upstream), torch.autograd.grad(slow, leaves, upstream), strict=True
    ):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


def test_ramp_one_is_the_surrogate_and_ramp_zero_the_staircase() -> None:
    params = parameters(3)
    x = torch.linspace(-0.5, 2.5, 1001, dtype=torch.float64)
    assert torch.allclose(threshold_quantize(x, *params, ramp=1.0), h(x, *params), rtol=1e-13, atol=1e-14)
    assert torch.equal(threshold_quantize(x, *params, ramp=0.0), threshold_quantize(x, *params))
    assert len(threshold_quantize(x, *params).unique()) == 8


@given(bits=st.integers(2, 5), seed=st.integers(0, 2**16), ramp=st.sampled_from([0.0, 0.2, 1.0]))
def test_output_is_monotone_in_the_input(bits: int, seed: int, ramp: float) -> None:
    params = parameters(bits, torch.float32, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, generator=generator).sort().values * 2
    y = threshold_quantize(x, *params, ramp=ramp)
    assert (y.diff() >= 0).all()
    assert y.min() >= 0
    assert y.max() <= 2 * params[3] * (1 + 1e-6)


@given(bits=st.integers(2, 8), seed=st.integers(0, 2**16))
def test_codes_count_the_thresholds_below(bits: int, seed: int) -> None:
    params = parameters(bits, torch.float32, seed)
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 2
    thresholds = threshold_tables(*params, torch.float32).thresholds
    expected = ((x * params[2])[:, None] > thresholds).sum(1)
    assert torch.equal(threshold_codes(x, *params[:3]).long(), expected)


def test_nan_and_infinity_stay_visible() -> None:
    params = [p.requires_grad_() for p in parameters(2, torch.float32)]
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.4], requires_grad=True)
    y = threshold_quantize(x, *params)
    assert y[0].isnan()
    assert y[1].item() == pytest.approx(1.4)
    assert y[2] == 0
    y.sum().backward()
    assert x.grad[0].isnan()
    assert x.grad[1] == 0
    assert x.grad[2] == 0
    assert all(p.grad.isnan().any() for p in params)
    with pytest.raises(ValueError, match="1 of 4 values are NaN"):
        threshold_codes(x, *params[:3])


def test_infinite_inputs_leave_parameter_gradients_finite() -> None:
    params = [p.requires_grad_() for p in parameters(2, torch.float32)]
    threshold_quantize(torch.tensor([torch.inf, -torch.inf, 0.4]), *params).sum().backward()
    assert all(p.grad.isfinite().all() for p in params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    params = parameters(4, torch.float32)
    x = torch.randn(1000).to(dtype)
    y = threshold_quantize(x, *params)
    assert y.dtype == dtype
    assert torch.equal(y, threshold_quantize(x.float(), *params).to(dtype))


def test_autocast_leaves_the_quantizer_in_float32() -> None:
    params = parameters(4, torch.float32)
    x = torch.randn(1000)
    with torch.autocast("cpu", torch.bfloat16):
        y = threshold_quantize(x, *params)
        z = threshold_quantize(x.bfloat16(), *params)
    assert torch.equal(y, threshold_quantize(x, *params))
    assert z.dtype == torch.bfloat16


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded", "empty", "scalar"])
def test_layouts(layout: str) -> None:
    base = torch.randn(2, 3, 4, 5)
    x = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 3),
        "strided": base[:, :, ::2, 1::2],
        "expanded": base[:1, :, :1, :1].expand(4, 3, 5, 5),
        "empty": base[:0],
        "scalar": base[0, 0, 0, 0],
    }[layout].requires_grad_()
    params = [p.requires_grad_() for p in parameters(2, torch.float32)]
    y = threshold_quantize(x, *params)
    copy = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = threshold_quantize(copy, *params)
    assert torch.equal(y, expected)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(y, [x, *params], upstream)
    for a, b in zip(got, torch.autograd.grad(expected, [copy, *params], upstream), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def test_backward_keeps_one_tensor_of_the_inputs_size() -> None:
    params = [p.requires_grad_() for p in parameters(4, torch.float32)]
    x = torch.randn(1000, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        threshold_quantize(x, *params)
    assert sum(t.numel() for t in kept) <= x.numel() + sum(p.numel() for p in params)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck reads it
@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_opcheck(ramp: float) -> None:
    params = [p.requires_grad_() for p in parameters(2, torch.float32)]
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.lightning_n2uq.threshold_quantize.default, (x, *params, ramp))
    torch.library.opcheck(
        torch.ops.lightning_n2uq.threshold_quantize_backward.default,
        (x.detach(), x.detach(), *(p.detach() for p in params), ramp),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.int64)}, "x: got dtype torch.int64"),
        ({"widths": torch.ones(2, 2)}, r"widths: got shape \(2, 2\)"),
        ({"widths": torch.ones(256)}, r"widths: got shape \(256,\)"),
        ({"start": torch.ones(2)}, r"start: got shape \(2,\), allowed is one element"),
        ({"scale_in": torch.ones(1, dtype=torch.int32)}, "scale_in: got dtype torch.int32"),
        ({"scale_out": torch.ones(1, device="meta")}, "scale_out: is on meta, x is on cpu"),
        ({"ramp": 1.5}, "ramp: got 1.5, allowed is 0 to 1"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    start, widths, scale_in, scale_out = parameters(2, torch.float32)
    good = {
        "x": torch.zeros(3),
        "start": start,
        "widths": widths,
        "scale_in": scale_in,
        "scale_out": scale_out,
    }
    with pytest.raises(ValueError, match=message):
        threshold_quantize(**{**good, **change})
