"""Fast kernels of the codec against the reference: equal bytes, equal bits."""

import itertools
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor
from triton_interpreter import interpret

from hard_vectors import hard_vector, same_bits
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.ops.formats.gradient_codec import NUQFormat
from lightning_n2uq.ops.gradient_codec import nuq_decode_mean, nuq_encode

LENGTHS = (0, 1, 2, 7, 8, 9, 63, 64, 65, 403)


def formats(bucket_size: int) -> list[NUQFormat]:
    forms = []
    for bits, norm in itertools.product((2, 3, 4, 8), ("l2", "linf")):
        top = 2 ** (bits - 1) - 1
        table = tuple((code / top) ** 2 for code in range(top + 1))
        forms.append(NUQFormat(bits, bucket_size, norm, "float", 0))
        forms.append(NUQFormat(bits, bucket_size, norm, "float", (bits - 1) // 2 if bits > 2 else 0))
        forms.append(NUQFormat(bits, bucket_size, norm, "uniform"))
        forms.append(NUQFormat(bits, bucket_size, norm, "table", 0, table))
    return forms


def run(kernel: str, x: Tensor, form: NUQFormat, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Payload, decoded payload, mean of two payloads."""
    with force(kernel):
        payloads = torch.empty(2, form.nbytes(x.numel()), dtype=torch.uint8)
        nuq_encode(x, form, seed, payloads[0])
        nuq_encode(2 * x, form, seed + 2**63, payloads[1])
        one, mean = torch.empty_like(x), torch.empty_like(x)
        nuq_decode_mean(payloads[:1], form, x.numel(), one)
        nuq_decode_mean(payloads, form, x.numel(), mean)
    return payloads, one, mean


def assert_same(kernel: str, x: Tensor, form: NUQFormat, seed: int = 3) -> None:
    for fast, reference in zip(run(kernel, x, form, seed), run("reference", x, form, seed), strict=True):
        assert same_bits(fast, reference), (kernel, form, x.numel())


def assert_same_at_any_byte(kernel: str, x: Tensor, device: str = "cpu") -> None:
    """Messages lie anywhere in memory, and a table's rows begin at any byte."""
    x = x.to(device)
    for form, first in itertools.product([NUQFormat(bits, 64) for bits in (2, 3, 4, 8)], range(4)):
        size, results = form.nbytes(x.numel()), []
        for choice in (kernel, "reference"):
            table, mean = torch.zeros(2, size + first, dtype=torch.uint8, device=device), torch.empty_like(x)
            with force(choice):
                for seed, row in enumerate(table):
                    nuq_encode(x, form, seed, row[first:])
                nuq_decode_mean(table[:, first:], form, x.numel(), mean)
            results.append((table, mean.nan_to_num(nan=1.25)))
        for fast, reference in zip(*results, strict=True):
            assert torch.equal(fast, reference), (kernel, form, first)


def test_numba_at_any_byte():
    pytest.importorskip("numba")
    assert_same_at_any_byte("numba", hard_vector(403))


@pytest.mark.parametrize("form", formats(64), ids=lambda f: f"{f.bits}-{f.norm}-{f.family}{f.mantissa_bits}")
def test_numba_gives_the_references_bytes(form):
    pytest.importorskip("numba")
    for numel in LENGTHS:
        assert_same("numba", hard_vector(numel), form)


@pytest.mark.parametrize("bucket_size", [8, 40, 1024, 32768])
def test_numba_at_other_bucket_sizes(bucket_size):
    pytest.importorskip("numba")
    for bits in (3, 4):
        assert_same("numba", hard_vector(70001), NUQFormat(bits, bucket_size))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_do_not_depend_on_threads(threads):
    pytest.importorskip("numba")
    x = hard_vector(400_003)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same("numba", x, NUQFormat())
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_at_once():
    """Autograd threads of different DDP buckets encode at the same time."""
    pytest.importorskip("numba")
    form, x = NUQFormat(), hard_vector(300_000)
    expected = [run("numba", x, form, seed)[0] for seed in range(4)]
    results: list[Tensor] = [torch.empty(0)] * 4

    def work(seed: int) -> None:
        payload = torch.empty(form.nbytes(x.numel()), dtype=torch.uint8)
        for _ in range(5):
            nuq_encode(x, form, seed, payload)
        results[seed] = payload

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, payloads[0]) for result, payloads in zip(results, expected, strict=True))


FORK_CASE = """
import os
import torch
from lightning_n2uq.compression import NUQCodec
torch.set_num_threads(2)
codec, x = NUQCodec(), torch.linspace(-1, 1, 300_000)
expected = codec.encode(x, 1).numpy().tobytes()
child = os.fork()
if child == 0:
    # not torch.equal: torch's own threads do not survive a fork
    os._exit(0 if codec.encode(x, 1).numpy().tobytes() == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_children_start_their_own_threads():
    pytest.importorskip("numba")
    command = [sys.executable, "-W", "ignore", "-c", FORK_CASE]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


def check_triton():
    """Also called by tests/ops/test_compiled_kernels.py, where the kernels are compiled."""
    for form in formats(64):
        if form.norm == "l2" or form.bits == 4:
            assert_same("triton", hard_vector(403 if form.bits % 2 else 9), form)
    assert_same("triton", hard_vector(403), NUQFormat(4, 40, "linf"))
    assert_same("triton", hard_vector(403), NUQFormat(4, 64))
    assert_same("triton", hard_vector(2300), NUQFormat(3, 2048))
    assert_same_at_any_byte("triton", hard_vector(403))


def check_triton_few():
    """Every branch of the kernels, in a fraction of the time of `check_triton`."""
    for form in (NUQFormat(4, 64), NUQFormat(4, 40, "linf"), formats(64)[2], formats(64)[3]):
        assert_same("triton", hard_vector(403), form)


@pytest.mark.compiled
def test_triton_gives_the_references_bytes_under_the_interpreter():
    interpret("import test_nuq_kernels; test_nuq_kernels.check_triton()")


def test_triton_compiles_to_ieee_arithmetic():
    """For an sm_90 GPU, without one: subnormals kept, no fused multiply-add, exact division and root."""
    compiler = pytest.importorskip("triton.compiler")
    backend = pytest.importorskip("triton.backends.compiler")
    from lightning_n2uq.ops.backends.triton import gradient_codec

    pointers = {"x_ptr": "*i32", "out_ptr": "*u8", "levels_ptr": "*fp32"}
    scalars = {"numel": "i64", "lo": "i32", "hi": "i32", "inverse_lowest": "fp32", "norm_bytes": "i64"}
    sizes = {"SIZE": 1024, "TILE": 1024, "L2": True, "BITS": 4, "FAMILY": 0, "MANTISSA": 0}
    constants = {**sizes, "GROUP": 4, "GROUP_BYTES": 2, "FAST": True, "LARGEST": 0x7777, "WHOLE": True}
    signature = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = compiler.ASTSource(gradient_codec._encode_kernel, signature, constants, attributes)
    target = backend.GPUTarget("cuda", 90, 32)
    ptx = compiler.compile(source, target=target, options={"enable_fp_fusion": False}).asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "sqrt.rn.f64" in ptx
    assert "ftz" not in ptx
    assert ptx.count("fma.rn.f32") == 2 * 4 * 8  # in two branches: two corrections of a quotient, 8 values
    assert "ld.global.v4" in ptx
    assert "st.global.b16" in ptx or "st.global.v4.b16" in ptx


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e30])
def test_cuda_divides_as_the_cpu_does(scale: float):
    x = torch.randn(3_000_000) * scale * torch.rand(3_000_000) ** 8
    for form in formats(1024):
        here = torch.empty(form.nbytes(x.numel()), dtype=torch.uint8)
        there = here.cuda()
        nuq_encode(x, form, 5, here)
        nuq_encode(x.cuda(), form, 5, there)
        assert torch.equal(here, there.cpu()), form


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_the_bytes_of_the_cpu():
    for form in formats(64):
        x = hard_vector(4003)
        here = torch.empty(form.nbytes(4003), dtype=torch.uint8)
        there = here.cuda()
        nuq_encode(x, form, 5, here)
        nuq_encode(x.cuda(), form, 5, there)
        assert torch.equal(here, there.cpu()), form


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_at_any_byte():
    """Words are stored where memory allows only: a GPU refuses others."""
    assert_same_at_any_byte("triton", hard_vector(4003), "cuda")
