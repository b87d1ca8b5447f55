"""The Triton kernels of the fused chain and of a block's end against the reference.

Run with TRITON_INTERPRET=1 it takes CPU tensors; `check_all` is also called on a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_n2uq.layers import QuantConv2d, QuantSpec
from lightning_n2uq.ops.backends.triton.product import INTERPRETED
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.formats.fused_activation import NormParameters, PReLUParameters, Window
from lightning_n2uq.ops.fused_activation import packed_activation
from lightning_n2uq.ops.fused_conv import Geometry, PackedInput, QuantizedWeight, packed_conv2d
from lightning_n2uq.ops.residual import residual_activation
from lightning_n2uq.ops.stem import norm_relu_pool
from lightning_n2uq.ops.tables import QuantizerParameters

EPS = 1e-5


def leaf(values: Tensor) -> Tensor:
    return values.detach().requires_grad_()


def quantizer(bits: int, device: str) -> QuantizerParameters:
    n = 2**bits - 1
    widths = (0.2 + torch.rand(n)) * 2 / n
    values = (torch.tensor([-0.1]), widths, torch.tensor([1.3]), torch.tensor([0.7]))
    return QuantizerParameters(*(leaf(v.to(device)) for v in values))


def activation(channels: int, device: str) -> PReLUParameters:
    slope = 0.25 + 0.2 * torch.randn(channels)
    values = torch.randn(channels), slope, torch.randn(channels)
    return PReLUParameters(*(leaf(v.to(device)) for v in values))


def norm(channels: int, device: str) -> NormParameters:
    gamma, beta = 1 + 0.3 * torch.randn(channels), torch.randn(channels)
    return NormParameters(leaf(gamma.to(device)), leaf(beta.to(device)), EPS)


def both(call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for kernels in ("reference", "triton"):
        with force(kernels):
            results.append(call())
    return results[0], results[1]


def close(slow: Tensor, fast: Tensor, terms: int = 1, rtol: float = 2e-6) -> None:
    """`terms` numbers were added up in another order."""
    scale = max(1.0, float(slow.detach().double().nan_to_num(0, 0, 0).abs().max())) if slow.numel() else 1.0
    atol = rtol * scale * max(1, terms) ** 0.5
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol, equal_nan=True)


def mostly_close(slow: Tensor, fast: Tensor, rtol: float = 1e-5) -> None:
    """A norm's last bits may push a value over a threshold: one in a thousand may differ."""
    differs = ~torch.isclose(fast, slow, rtol=rtol, atol=rtol, equal_nan=True)
    assert differs.float().mean() < 2e-3, differs.float().mean()


def check_chain(
    shape: tuple[int, ...],
    bits: int,
    device: str,
    *,
    with_norm: bool,
    with_act: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    channels = shape[1]
    x = leaf((torch.randn(shape) + 0.5).to(device, dtype))
    grad = torch.randn(shape).to(device, dtype)
    affine = norm(channels, device) if with_norm else None
    act = activation(channels, device) if with_act else None
    values = quantizer(bits, device)

    def call() -> list[Tensor]:
        y, packed, stats = packed_activation(x, affine, act, values, dtype)
        leaves = [x, *(affine or ())[:2], *(act or ()), *values]
        return [y, stats, *torch.autograd.grad(y, leaves, grad), packed]

    slow, fast = both(call)
    assert not fast[0].numel() or fast[0].is_contiguous(memory_format=torch.channels_last)
    if with_norm:
        mostly_close(slow[0], fast[0])
        close(slow[1], fast[1])
        mostly_close(slow[2], fast[2], 1e-4 if dtype == torch.float32 else 1e-2)
        tolerance = {"rtol": 1e-3, "atol": 2e-3 * x.numel() ** 0.5}
        for a, b in zip(slow[3:-1], fast[3:-1], strict=True):
            torch.testing.assert_close(b, a, **tolerance)
    else:
        assert torch.equal(slow[0], fast[0])
        assert torch.equal(slow[2], fast[2])
        for a, b in zip(slow[3:-1], fast[3:-1], strict=True):
            close(a, b, x.numel())
    check_rebuild(fast[0], fast[-1], values.scale_out, bits)


def check_rebuild(y: Tensor, packed: Tensor, scale_out: Tensor, bits: int) -> None:
    from lightning_n2uq.ops.backends.triton import fused_activation

    again = fused_activation.rebuild(packed, scale_out, bits, y.shape, y.dtype)
    assert torch.equal(y, again)


def check_nan(device: str) -> None:
    from lightning_n2uq.ops.backends.triton import fused_activation

    x = torch.randn(2, 8, 3, 3).to(device)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.nan, torch.inf
    x.requires_grad_()
    values = quantizer(2, device)
    slow, fast = both(lambda: list(packed_activation(x, None, None, values, torch.float32)[:2]))
    assert torch.equal(slow[0].nan_to_num(9.0), fast[0].nan_to_num(9.0))
    again = fused_activation.rebuild(fast[1], values.scale_out, 2, x.shape, torch.float32)
    assert bool(again[0, 0, 0, 0].isnan())
    grads = []
    for kernels in ("reference", "triton"):
        with force(kernels):
            y = packed_activation(x, None, None, values, torch.float32)[0]
            grads.append(torch.autograd.grad(y.sum(), [x, *values]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(grads[0][0].nan_to_num(9.0), grads[1][0].nan_to_num(9.0))


def check_packed_conv(device: str, bits: int) -> None:
    """The gradients of a convolution that keeps codes are those of the one that keeps floats."""
    values = quantizer(bits, device)
    x = torch.randn(2, 8, 6, 5).to(device)
    weight = leaf(torch.randn(4, 8, 3, 3).to(device))
    with force("triton"):
        y, packed, _ = packed_activation(x, None, None, values, torch.float32)
        y = leaf(y)
        out = packed_conv2d(
            PackedInput(y, packed, values[3], bits),
            QuantizedWeight(weight),
            None,
            Geometry((2, 2), (1, 1), (1, 1), 1),
        )
        grad = torch.randn_like(out)
        ours = torch.autograd.grad(out, [y, weight], grad)
    plain = nn.functional.conv2d(y, weight, None, 2, 1)
    close(plain, out, 72)
    for a, b in zip(torch.autograd.grad(plain, [y, weight], grad), ours, strict=True):
        close(a, b, 72)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert ours[1].is_contiguous()


def check_residual(
    shape: tuple[int, ...], device: str, *, both_norms: bool, dtype: torch.dtype = torch.float32
) -> None:
    channels = shape[1]
    x, other = (leaf(torch.randn(shape).to(device, dtype)) for _ in range(2))
    first, act = norm(channels, device), activation(channels, device)
    second = norm(channels, device) if both_norms else None
    grad = torch.randn(shape).to(device, dtype)

    def call() -> list[Tensor]:
        y, stats, other_stats = residual_activation(x, first, other, second, act)
        leaves = [x, other, *first[:2], *act, *(second or ())[:2]]
        return [y, stats, other_stats, *torch.autograd.grad(y, leaves, grad)]

    slow, fast = both(call)
    for i, (a, b) in enumerate(zip(slow, fast, strict=True)):
        close(a, b, 1 if i < 5 else x.numel(), 2e-5 if a.dtype == torch.float32 else 2e-2)


def check_stem(
    size: tuple[int, int],
    window: tuple[int, int, int],
    device: str,
    *,
    ties: bool = False,
    channels: int = 6,
    dtype: torch.dtype = torch.float32,
) -> None:
    values = torch.randn(2, channels, *size)
    x, affine = leaf((values.round() if ties else values).to(device, dtype)), norm(channels, device)
    grad = torch.randn_like(norm_relu_pool(x, affine, Window(*window))[0])

    def call() -> list[Tensor]:
        y, stats = norm_relu_pool(x, affine, Window(*window))
        return [y, stats, *torch.autograd.grad(y, [x, *affine[:2]], grad)]

    slow, fast = both(call)
    for i, (a, b) in enumerate(zip(slow, fast, strict=True)):
        close(a, b, 1 if i < 3 else x.numel(), 2e-5 if a.dtype == torch.float32 else 2e-2)


def check_many_programs(device: str) -> None:
    """More partial sums than a finishing program adds up at a time."""
    from lightning_n2uq.ops.backends.triton.channels import channel_gradients, measured_norm

    x = (torch.randn(1, 4, 200, 200) + 3).to(device, memory_format=torch.channels_last)
    stats, table = measured_norm(x, *norm(4, device))
    close(torch.stack(torch.var_mean(x.double(), (0, 2, 3), correction=0)).flip(0).float(), stats)
    sums, rows = torch.randn(700, 4, 10, dtype=torch.float64, device=device), 1000
    affine, act = norm(10, device), activation(10, device)
    table = torch.rand(4, 10, device=device) + 0.5
    correction, grads = channel_gradients(sums, table, affine, act, rows)
    bias, slope, out, moment = sums.sum(0)
    inverse = table[1].double()
    expected = [torch.stack([bias, moment * inverse**2]) / rows, moment * inverse, bias, bias, slope, out]
    for a, b in zip(expected, [correction, *grads], strict=True):
        close(a.float(), b)


def check_fakes(device: str) -> None:
    """Shapes, dtypes and strides that a compiler is told are those that come out."""
    ops = torch.ops.lightning_n2uq
    values, act = quantizer(2, device), activation(6, device)
    x, affine = leaf(torch.randn(2, 6, 4, 4).to(device)), norm(6, device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")

    def check(operator: Callable[..., object], *arguments: object) -> object:
        torch.library.opcheck(operator.default, arguments, test_utils=tests)  # type: ignore[attr-defined]
        with torch.no_grad():
            return operator(*arguments)

    y, packed, stats = check(ops.packed_activation, x, *affine, *act, *values, torch.float32)
    scales, behind, steps = ([t.detach() for t in part] for part in (affine[:2], act, values))
    given = (torch.randn_like(y), x.detach(), packed, stats, scales, EPS, behind, steps)
    check(ops.packed_activation_backward, *given, "triton")
    weight, geometry = torch.randn(4, 6, 3, 3).to(device), ([1, 1], [1, 1], [1, 1], 1)
    codes = packed, values[3].detach(), 2
    out = check(ops.packed_conv2d, y, *codes, weight, None, None, 0, False, None, *geometry)
    scale = torch.rand(4, 1, 1, 1).to(device)
    options = (weight, scale, 2, False, [2, 6, 4, 4], *geometry, [True, True, False])
    check(ops.packed_conv2d_backward, torch.randn_like(out), *codes, *options)
    check(ops.quantize_weight, weight, 3, False)
    other = torch.randn(2, 6, 4, 4).to(device)
    y, first, second = check(ops.residual_activation, x, *affine, other, *affine, *act)
    given = (torch.randn_like(y), x.detach(), first, scales, EPS, other, second, scales, EPS)
    check(ops.residual_activation_backward, *given, behind, "triton")
    y, taps, stats = check(ops.norm_relu_pool, x, *affine, 3, 2, 1)
    given = (torch.randn_like(y), taps, x.detach(), stats, *scales, EPS, 3, 2, 1)
    check(ops.norm_relu_pool_backward, *given)


def check_layer(device: str) -> None:
    """The layer takes the fused path; on a GPU it compiles as one graph to the same bits but for sums."""
    conv = QuantConv2d(6, 8, 3, padding=1, bias=False, spec=QuantSpec(2, 3)).to(device)
    x = torch.randn(2, 6, 7, 7).to(device)
    results = []
    with force("triton"):
        backend = "inductor" if device == "cuda" else "eager"
        for call in (conv, torch.compile(conv, fullgraph=True, backend=backend)):
            conv.zero_grad()
            y = call(x)
            y.square().sum().backward()
            results.append([y.detach(), conv.weight.grad.clone()])
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(results[0], results[-1], strict=True):
        close(a, b)


def check_half_precision(device: str) -> None:
    """Maps as autocast has them; Triton's interpreter does not round them."""
    for dtype in (torch.bfloat16, torch.float16):
        for bits in (2, 4):
            check_chain((2, 16, 5, 5), bits, device, with_norm=False, with_act=True, dtype=dtype)
            check_chain((4, 70, 6, 6), bits, device, with_norm=True, with_act=True, dtype=dtype)
        check_residual((3, 24, 6, 6), device, both_norms=True, dtype=dtype)
        check_stem((9, 12), (3, 2, 1), device, channels=16, dtype=dtype)


def check_few(device: str) -> None:
    """Every kernel once, in a fraction of the time of `check_all`."""
    torch.manual_seed(0)
    check_chain((2, 6, 5, 5), 2, device, with_norm=False, with_act=True)
    check_chain((3, 16, 5, 5), 2, device, with_norm=True, with_act=True)
    check_nan(device)
    check_packed_conv(device, 2)
    check_stem((9, 12), (3, 2, 1), device, ties=True)
    check_residual((2, 24, 4, 4), device, both_norms=True)


def check_all(device: str) -> None:
    torch.manual_seed(0)
    if not INTERPRETED.value:
        check_half_precision(device)
    for bits in (1, 2, 3, 4):
        check_chain((2, 6, 5, 5), bits, device, with_norm=False, with_act=bits > 1)
    check_chain((3, 80, 7, 7), 2, device, with_norm=False, with_act=True)
    check_chain((2, 1, 9, 9), 2, device, with_norm=False, with_act=False)
    for bits, channels in ((2, 16), (4, 3)):
        check_chain((4, channels, 9, 9), bits, device, with_norm=True, with_act=True)
    check_chain((4, 16, 9, 9), 2, device, with_norm=True, with_act=False)
    check_nan(device)
    for bits in (2, 3):
        check_packed_conv(device, bits)
    for size, window in (
        ((9, 12), (3, 2, 1)),
        ((8, 8), (2, 2, 0)),
        ((7, 7), (3, 1, 1)),
        ((11, 5), (4, 3, 2)),
    ):
        check_stem(size, window, device)
    check_stem((9, 12), (3, 2, 1), device, ties=True)
    check_many_programs(device)
    for both_norms in (False, True):
        check_residual((3, 70, 6, 6), device, both_norms=both_norms)
    with force("triton"):
        check_fakes(device)
    check_layer(device)
