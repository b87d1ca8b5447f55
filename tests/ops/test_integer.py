"""Integer convolution and linear layer: exact sums, every geometry and layout, and no saturation."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_n2uq.ops import dispatch, integer_conv2d, integer_linear
from lightning_n2uq.ops.dispatch import force, select
from lightning_n2uq.ops.formats.integer import IntegerRange
from lightning_n2uq.ops.integer import OP, integer_obstacle
from lightning_n2uq.utils import processor

CPU = torch.device("cpu")
onednn = pytest.mark.skipif(select(OP, CPU) != "onednn", reason="no integer kernels on this processor")

GEOMETRIES = [  # shape of the input, of the weight; stride, padding, dilation, groups
    ((2, 3, 9, 11), (5, 3, 3, 3), 1, 1, 1, 1),
    ((2, 16, 14, 14), (32, 16, 3, 3), 2, 1, 1, 1),
    ((1, 8, 7, 7), (12, 4, 3, 3), 1, 2, 2, 2),
    ((2, 6, 10, 9), (6, 1, 3, 3), (2, 1), (0, 2), (1, 2), 6),
    ((3, 10, 5, 5), (7, 10, 1, 1), 1, 0, 1, 1),
    ((3, 10, 5, 6), (8, 10, 1, 1), 2, 0, 1, 1),
    ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, 1),
    ((2, 64, 8, 8), (64, 64, 5, 1), 1, (2, 0), 1, 1),
    ((0, 4, 6, 6), (3, 4, 3, 3), 1, 1, 1, 1),
]
WIDTHS = [(1, 1), (2, 2), (4, 4), (7, 7), (8, 6), (3, 5), (8, 8)]


def odd_levels(shape: tuple[int, ...], bits: int) -> Tensor:
    n = 2**bits - 1
    return (2 * torch.randint(n + 1, shape) - n).clamp(-127, 127).to(torch.int8)


def exact(codes: Tensor, levels: Tensor, scale: Tensor, bias: Tensor | None, *geometry: object) -> Tensor:
    """Sums in int64, one product after the other."""
    sums = F.conv2d(codes.long(), levels.long(), None, *geometry) if codes.numel() else None
    if sums is None:
        sums = F.conv2d(codes.double(), levels.double(), None, *geometry)
    y = sums.float() * scale[:, None, None]
    return y if bias is None else y + bias[:, None, None]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("code_bits", "level_bits"), WIDTHS)
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation", "groups"), GEOMETRIES)
def test_convolution_is_the_exact_sum(
    size, kernel, stride, padding, dilation, groups, code_bits, level_bits, form, kernels, with_bias
):
    codes = torch.randint(2**code_bits, size, dtype=torch.uint8).contiguous(memory_format=form)
    levels, scale = odd_levels(kernel, level_bits), torch.rand(kernel[0]) + 0.1
    bias = torch.randn(kernel[0]) if with_bias else None
    geometry = stride, padding, dilation, groups
    with force(kernels):
        most = 2**code_bits - 1, min(2**level_bits - 1, 127)
        y = integer_conv2d(codes, levels, scale, bias, *geometry, largest_code=most[0], largest_level=most[1])
    assert torch.equal(y, exact(codes, levels, scale, bias, *geometry))
    assert y.is_contiguous(memory_format=form) or y.numel() == 0


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 33), (64,), (0, 8), (128, 512)])
@pytest.mark.parametrize(("code_bits", "level_bits"), WIDTHS)
def test_linear_layer_is_the_exact_sum(code_bits, level_bits, shape, kernels):
    codes, levels = (
        torch.randint(2**code_bits, shape, dtype=torch.uint8),
        odd_levels((11, shape[-1]), level_bits),
    )
    scale, bias = torch.rand(11), torch.randn(11)
    most = 2**code_bits - 1, min(2**level_bits - 1, 127)
    with force(kernels):
        plain = integer_linear(codes, levels, scale, largest_code=most[0], largest_level=most[1])
        biased = integer_linear(codes, levels, scale, bias, largest_code=most[0], largest_level=most[1])
    expected = (codes.long() @ levels.long().T).float() * scale
    assert torch.equal(plain, expected)
    assert torch.equal(biased, expected + bias)


@pytest.mark.parametrize("largest", [{}, {"largest_code": 255, "largest_level": 127}])
def test_the_largest_codes_and_levels_do_not_saturate(largest):
    codes = torch.full((1, 64, 6, 6), 255, dtype=torch.uint8)
    levels, scale = torch.full((8, 64, 3, 3), 127, dtype=torch.int8), torch.ones(8)
    levels[4:] = -127
    y = integer_conv2d(codes, levels, scale, **largest)
    assert (y.abs() == 255 * 127 * 64 * 9).all()
    flat = integer_linear(
        codes.flatten(1), levels[:, :1, :1, :1].flatten(1).expand(8, 64 * 36).contiguous(), scale
    )
    assert (flat.abs() == 255 * 127 * 64 * 36).all()


@onednn
def test_sums_that_could_saturate_are_obstacles(monkeypatch):
    monkeypatch.setattr(processor, "flags", lambda: frozenset())
    assert integer_obstacle(IntegerRange(127, 127, 4608), CPU) is None
    assert "16 bits" in integer_obstacle(IntegerRange(255, 127, 1), CPU)
    assert "32 bits" in integer_obstacle(IntegerRange(127, 127, 10**6), CPU)
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"avx512_vnni"}))
    assert integer_obstacle(IntegerRange(255, 127, 4608), CPU) is None
    assert "32 bits" in integer_obstacle(IntegerRange(255, 127, 10**5), CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # oneDNN will not use what the processor has
    assert "no VNNI" in integer_obstacle(IntegerRange(255, 127, 1), CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "ALL")
    assert integer_obstacle(IntegerRange(255, 127, 1), CPU) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_half_precision_rounds_the_float32_result_once(dtype, with_bias):
    codes, levels = torch.randint(16, (2, 8, 6, 6), dtype=torch.uint8), odd_levels((4, 8, 3, 3), 4)
    scale, bias = torch.rand(4) * 0.01, torch.randn(4) if with_bias else None
    y = integer_conv2d(codes, levels, scale, bias, largest_code=15, largest_level=15, dtype=dtype)
    assert torch.equal(y, integer_conv2d(codes, levels, scale, bias).to(dtype))


def test_views_are_read_as_they_are():
    codes = torch.randint(16, (4, 9, 8, 6), dtype=torch.uint8).permute(3, 2, 0, 1)[:, ::2]
    levels, scale = odd_levels((3, 4, 3, 3), 3), torch.ones(3)
    y = integer_conv2d(codes, levels, scale, padding=1, largest_code=15, largest_level=7)
    assert torch.equal(y, exact(codes, levels, scale, None, 1, 1))
    assert y.is_contiguous()


def test_what_is_not_finite_stays_visible():
    codes, levels = torch.ones(1, 2, 3, 3, dtype=torch.uint8), torch.ones(3, 2, 1, 1, dtype=torch.int8)
    y = integer_conv2d(codes, levels, torch.tensor([1.0, torch.nan, torch.inf]))
    assert y[:, 1].isnan().all()
    assert y[:, 2].isinf().all()


BAD = [
    ({"codes": torch.ones(1, 2, 3, 3)}, "codes: got torch.float32, allowed is torch.uint8"),
    ({"codes": torch.ones(2, 3, 3, dtype=torch.uint8)}, r"codes: got \(2, 3, 3\), allowed is \[N, C, H, W\]"),
    ({"levels": torch.ones(3, 2, 1, 1)}, "levels: got torch.float32, allowed is torch.int8"),
    (
        {"levels": torch.ones(3, 1, 1, 1, dtype=torch.int8)},
        "levels: got .* allowed fits 2 channels in 1 groups",
    ),
    ({"scale": torch.ones(2)}, r"scale: got \(2,\), allowed is \(3,\)"),
    ({"bias": torch.ones(2)}, r"bias: got \(2,\), allowed is \(3,\)"),
    ({"dtype": torch.float64}, "dtype: got torch.float64, allowed are torch.float32"),
    ({"largest_code": 256}, "largest_code: got 256, allowed is 1 to 255"),
    ({"largest_level": 0}, "largest_level: got 0, allowed is 1 to 128"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_are_named(change, message):
    good = {
        "codes": torch.ones(1, 2, 3, 3, dtype=torch.uint8),
        "levels": torch.ones(3, 2, 1, 1, dtype=torch.int8),
        "scale": torch.ones(3),
    }
    with pytest.raises(ValueError, match=message):
        integer_conv2d(**good | change)


def test_a_linear_layer_of_another_width_is_named():
    codes, levels = torch.ones(4, 5, dtype=torch.uint8), torch.ones(3, 6, dtype=torch.int8)
    with pytest.raises(ValueError, match="levels: got"):
        integer_linear(codes, levels, torch.ones(3))


@pytest.mark.parametrize("backend", ["reference", pytest.param("onednn", marks=onednn)])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_opcheck(form, backend):
    codes = torch.randint(16, (2, 4, 6, 7), dtype=torch.uint8).contiguous(memory_format=form)
    levels, numbers = odd_levels((6, 4, 3, 3), 4), (torch.rand(6), torch.rand(6))
    geometry = [2, 1], [1, 1], [1, 1], 1
    operators = torch.ops.lightning_n2uq
    given = codes, levels, *numbers, *geometry, torch.bfloat16, backend
    torch.library.opcheck(operators.integer_conv2d.default, given)
    flat = codes.flatten(2), odd_levels((6, 42), 4), *numbers, torch.float32, backend
    torch.library.opcheck(operators.integer_linear.default, flat)


def test_compiled_and_exported_programs_have_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, codes: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
            return integer_conv2d(codes, levels, scale, padding=1, largest_code=15, largest_level=15)

    given = torch.randint(16, (2, 4, 6, 7), dtype=torch.uint8), odd_levels((6, 4, 3, 3), 4), torch.rand(6)
    expected = Layer()(*given)
    assert torch.equal(torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*given), expected)
    program = torch.export.export(Layer(), given)
    assert any("integer_conv2d" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*given), expected)


def test_other_kernels_turn_integers_off_alone():
    pytest.importorskip("numba")
    with force("numba"):
        assert select(OP, CPU) == "reference"
        assert select("packed_activation", CPU) == "numba"
        assert "no integer arithmetic" in integer_obstacle(IntegerRange(1, 1, 1), CPU)
    line = next(line for line in dispatch.report() if line.op == OP)
    assert line.reason


@onednn
def test_forced_onednn_leaves_other_operators_to_the_automatic_choice():
    with force("onednn"):
        assert select(OP, CPU) == "onednn"
        assert select("nuq", CPU) == dispatch._automatic("numba", "cpu", False)[0]
        with pytest.raises(ValueError, match="onednn kernels run on cpu only"):
            select(OP, torch.device("cuda"))


@pytest.mark.parametrize(
    ("what", "value", "reason"),
    [
        ("has_vectors", lambda: False, "onednn needs an x86 processor with AVX2 or AVX-512"),
        ("integer_operators", lambda: None, "this build of torch has no integer convolutions of onednn"),
    ],
)
def test_without_the_instructions_or_the_operators_the_reason_is_said(monkeypatch, what, value, reason):
    owner = processor if what == "has_vectors" else dispatch
    monkeypatch.setattr(processor, "has_vectors", lambda: True)
    monkeypatch.setattr(owner, what, value)
    dispatch._choose_from.cache_clear()
    try:
        line = next(line for line in dispatch.report() if (line.op, line.device) == (OP, "cpu"))
        assert (line.kernel, line.reason) == ("reference", reason)
    finally:
        monkeypatch.undo()
        dispatch._choose_from.cache_clear()
