"""The emulator that judges compiled kernels, judged itself: exact arithmetic, and programs that are wrong."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_n2uq.ops import threshold_quantize
from lightning_n2uq.ops.dispatch import force
from ptx_emulator import device
from ptx_emulator.code import fusable, parse
from ptx_emulator.machine import Machine
from ptx_emulator.memory import Fault, GlobalMemory
from ptx_emulator.operations import fma32, to_bfloat16

pytestmark = pytest.mark.compiled

HEAD = """
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u32 kernel_param_1
)
.reqntid {threads}
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<99>;
    ld.param.b64 %rd0, [kernel_param_0];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd1, %r0, 4, %rd0;  // where this thread writes
"""


def run(body: str, out: Tensor, number: int = 0, threads: int = 32, programs: int = 1) -> Tensor:
    storage = out.untyped_storage()
    memory = GlobalMemory({(storage.data_ptr(), storage.nbytes())})
    kernel = parse(HEAD.format(threads=threads) + body + "ret;\n}")
    Machine(kernel, (programs, 1, 1), [out.data_ptr(), number], memory, 1024).run()
    return out


def answer(body: str, kind: str = "b32", threads: int = 32) -> list[int]:
    """What the threads leave in `%r1`."""
    store = f"st.global.{kind} [%rd1], {{ %r1 }};\n"
    return run(body + store, torch.zeros(threads, dtype=torch.int32), threads=threads).tolist()


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(floats, floats, floats)
def test_multiply_add_rounds_once(a: float, b: float, c: float) -> None:
    _check_multiply_add(a, b, c)


@given(st.integers(0, 2047), st.sampled_from([1e-40, -1e-40, 2.0**-149]), st.sampled_from([1, -1]))
def test_multiply_add_next_to_halfway(k: int, tiny: float, sign: int) -> None:
    """Sums that two roundings get wrong: a product half way between two numbers, and next to nothing."""
    _check_multiply_add(sign * (1 + (2 * k + 1) * 2**-12), 1 + 2**-12, tiny)


@np.errstate(all="ignore")
def _check_multiply_add(*values: float) -> None:
    a, b, c = (np.array([v], np.float32) for v in values)
    exact = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    found = fma32(a, b, c)[0]
    if np.isinf(found):
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    near = [found, *(np.nextafter(found, np.float32(limit)) for limit in (-np.inf, np.inf))]
    near = [n for n in near if np.isfinite(n)]
    nearest = min(near, key=lambda n: (abs(Fraction(float(n)) - exact), int(n.view(np.int32)) & 1))
    assert found == nearest


def test_bfloat16_is_rounded_as_torch_does() -> None:
    raw = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).int().view(torch.float32)
    raw[:4] = torch.tensor([math.inf, -math.inf, 3.4e38, 1e-45])
    values = raw[~raw.isnan()]
    expected = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bfloat16(values.numpy()) == expected).all()
    assert to_bfloat16(np.array([np.nan], np.float32))[0] == 0x7FFF


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("add.f32 %r1, 0f7F800000, 0fFF800000;", 0x7FFFFFFF),  # a GPU has one NaN
        ("mov.b32 %r2, 0f00000001; mul.f32 %r1, %r2, 0f3F000000;", 0),  # a tie goes to even
        ("fma.rn.sat.f32 %r1, 0f7FC00000, 0f3F800000, 0f3F800000;", 0),
        ("fma.rn.sat.f32 %r1, 0f40000000, 0f3F800000, 0f3F800000;", 0x3F800000),
        ("div.rn.f32 %r1, 0f00000002, 0f40000000;", 1),  # subnormal numbers stay
        ("min.f32 %r1, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("min.NaN.f32 %r1, 0f7FC00000, 0f3F800000;", 0x7FFFFFFF),
        ("max.f32 %r1, 0f80000000, 0f00000000;", 0),
        ("min.f32 %r1, 0f00000000, 0f80000000;", 0x80000000),
        ("prmt.b32 %r1, 0x33221100, 0x77665544, 0x7531U;", 0x77553311),
        ("prmt.b32 %r1, 0x80000000, 0, 0xB3B3U;", 0xFF80FF80),
        ("lop3.b32 %r1, 0xF0, 0xCC, 0xAA, 0xE8U;", 0xE8),
        ("bfe.s32 %r1, 0x00000F00, 8, 4;", 0xFFFFFFFF),
        ("bfi.b32 %r1, 0x5, 0xFFFFFFFF, 4, 4;", 0xFFFFFF5F),
        ("shf.l.wrap.b32 %r1, 0x80000000, 0x1, 1;", 3),
        ("shl.b32 %r1, 1, 32;", 0),
        ("shr.s32 %r1, -8, 40;", 0xFFFFFFFF),
        ("popc.b32 %r1, 0xF0F0;", 8),
        ("mul.hi.u32 %r1, 0xFFFFFFFF, 0xFFFFFFFF;", 0xFFFFFFFE),
        ("div.s32 %r1, -7, 2;", 0xFFFFFFFD),
        ("rem.s32 %r1, -7, 2;", 0xFFFFFFFF),
        ("cvt.rzi.s32.f32 %r1, 0f4F800000;", 0x7FFFFFFF),
        ("cvt.rni.s32.f32 %r1, 0f40200000;", 2),
        ("cvt.rn.bf16x2.f32 %r1, 0f3F800000, 0f40000000;", 0x3F804000),
        ("mov.b64 %rd2, 0x100000002; mov.b64 {%r2, %r1}, %rd2;", 1),
        ("setp.gtu.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 5, 6, %p1;", 5),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f00000000; selp.b32 %r1, 5, 6, %p1;", 6),
        ("mov.b16 %rs1, 0x3F80; sub.rn.f32.bf16 %r1, %rs1, 0f40000000;", 0xBF800000),
        ("mov.b16 %rs1, 0x3C00; fma.rn.f32.f16 %r1, %rs1, %rs1, 0f40000000;", 0x40400000),
        ("abs.bf16x2 %r1, 0xBF80C000;", 0x3F804000),
        ("neg.bf16x2 %r1, 0xBF804000;", 0x3F80C000),
        ("add.s16x2 %r1, 0x0001FFFF, 0x00010001;", 0x00020000),
        ("mov.b64 %rd2, 0x400000003F800000; add.rn.f32x2 %rd3, %rd2, %rd2; shr.u64 %rd3, %rd3, 32; "
         "cvt.u32.u64 %r1, %rd3;", 0x40800000),
    ],
)  # fmt: skip
def test_operations(code: str, expected: int) -> None:
    assert answer(code)[7] % 2**32 == expected


def test_threads_part_and_meet_again() -> None:
    body = """
    mov.b32 %r1, 0;
$again:
    add.s32 %r1, %r1, 1;
    setp.lt.u32 %p1, %r1, %r0;
    @%p1 bra $again;
    mul.lo.s32 %r1, %r1, 10;
    bar.sync 0;
    """
    assert answer(body) == [10, *(10 * i for i in range(1, 32))]


def test_sums_of_a_warp() -> None:
    steps = [
        f"shfl.sync.bfly.b32 %r2, %r1, {step}, 31, -1; add.s32 %r1, %r1, %r2;\n" for step in (16, 8, 4, 2, 1)
    ]
    assert answer("mov.b32 %r1, %r0;" + "".join(steps), threads=64) == [496] * 32 + [1520] * 32
    assert answer("redux.sync.max.s32 %r1, %r0, -1;", threads=64) == [31] * 32 + [63] * 32


EXCHANGE = """
    shl.b32 %r2, %r0, 2;
    st.shared.b32 [%r2], {{ %r0 }};
    {barrier}
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 {{ %r1 }}, [%r3];
"""


def test_warps_exchange_values_behind_a_barrier_only() -> None:
    assert answer(EXCHANGE.format(barrier="bar.sync 0;"), threads=64) == [*range(32, 64), *range(32)]
    with pytest.raises(Fault, match="no barrier between"):
        answer(EXCHANGE.format(barrier=""), threads=64)


def test_matrices_are_stored_and_loaded() -> None:
    """Thread `t` holds numbers `2t` and `2t + 1`, in the order in which memory then has them."""
    body = """
    shl.b32 %r2, %r0, 1;
    add.s32 %r3, %r2, 1;
    shl.b32 %r3, %r3, 16;
    or.b32 %r3, %r3, %r2;
    and.b32 %r4, %r0, 7;
    shl.b32 %r4, %r4, 4;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r3};
    bar.sync 0;
    """
    plain = body + "shl.b32 %r5, %r0, 2; ld.shared.b32 { %r1 }, [%r5];"
    assert answer(plain) == [2 * t | (2 * t + 1) << 16 for t in range(32)]
    turned = body + "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r1}, [%r4];"
    matrix = np.arange(64).reshape(8, 8).T.reshape(32, 2)
    assert answer(turned) == [int(low | high << 16) for low, high in matrix]


@pytest.mark.parametrize(
    ("body", "words", "reason"),
    [
        ("st.global.b32 [%rd1+64], { %r0 };", 40, "outside all tensors"),
        ("st.global.b32 [%rd1+2], { %r0 };", 64, "which 4 does not divide"),
        ("ld.global.v2.b32 { %r1, %r2 }, [%rd1];", 64, "does not divide"),
        ("mov.u32 %r2, %ctaid.x; st.global.b32 [%rd1], { %r2 };", 64, "two threads write"),
        ("mov.u32 %r2, %ctaid.x; setp.eq.b32 %p1, %r2, 0; @%p1 bra $end; st.global.b32 [%rd1], { %r2 };"
         " bra $last;\n$end:\n mov.b32 %r3, 9; st.global.b32 [%rd1], { %r3 };\n$last:\n", 64,
         "changes what another one writes"),
        ("mov.u32 %r2, %ctaid.x; mad.wide.u32 %rd2, %r2, 128, %rd1; st.global.b32 [%rd2], { %r0 }; "
         "ld.global.b32 { %r1 }, [%rd1];", 64, "reads what another one writes"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra $end; bar.sync 0;\n$end:\n", 64, "not all threads reach"),
        ("add.s32 %r1, %r5, 1;", 64, "%r5 is read before it is written"),
        ("ld.shared.b32 { %r1 }, [%r0];", 64, "does not divide|before it is written"),
        ("mov.b32 %r2, 0; ld.shared.b32 { %r1 }, [%r2];", 64, "before it is written"),
        ("mov.b32 %r2, 1024; st.shared.b32 [%r2], { %r0 };", 64, "of 1024 bytes of shared memory"),
        ("div.full.f32 %r1, 0f3F800000, 0f3F800000;", 64, "not rounded as IEEE"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", 64, "take no part"),
        ("add.rn.bf16x2 %r1, 0x3F803F80, 0x3F803F80;", 64, "arithmetic in bf16x2"),
        ("fma.rn.bf16x2 %r1, 0x3F803F80, 0x3F803F80, 0x3F803F80;", 64, "arithmetic in bf16x2"),
        ("min.f16x2 %r1, 0, 0;", 64, "arithmetic in f16x2"),
        ("ex2.approx.f32 %r1, 0f3F800000;", 64, "ex2"),
    ],
)  # fmt: skip
def test_what_a_gpu_would_refuse_is_a_fault(body: str, words: int, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        run(body, torch.zeros(words, dtype=torch.int32), programs=2)


def test_sums_that_the_assembler_may_fuse() -> None:
    fused = HEAD.format(threads=32) + "mul.f32 %r1, %r2, %r3; add.f32 %r4, %r5, %r1;\n}"
    assert len(fusable(parse(fused))) == 1
    for other in (fused.replace("mul.f32", "mul.rn.f32"), fused.replace("%r5, %r1", "%r5, %r2")):
        assert not fusable(parse(other))


def test_a_compiled_kernel_without_its_barriers_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    values = torch.tensor([0.1]), torch.rand(3) + 0.2, torch.tensor([1.3]), torch.tensor([0.7])
    x = torch.randn(3000, requires_grad=True)

    def without_barriers(ptx: str) -> object:
        return parse(ptx.replace("bar.sync", "// bar.sync"))

    with device.emulated_gpu(), force("triton"):
        threshold_quantize(x, *values).sum().backward()
    monkeypatch.setattr(device, "parse", without_barriers)
    with device.emulated_gpu(), force("triton"), pytest.raises(Fault, match="no barrier between"):
        threshold_quantize(x, *(v.requires_grad_() for v in values)).sum().backward()
