"""The Triton kernels of the quantizers, without a GPU: interpreted against the reference, compiled to PTX."""

import pytest
import torch
from triton_interpreter import interpret

from lightning_n2uq.ops import quantize_weight, threshold_quantize
from lightning_n2uq.ops.dispatch import force


@pytest.mark.compiled
def test_triton_quantizers_equal_the_reference_under_the_interpreter() -> None:
    interpret("import triton_cases; triton_cases.check_all()")


def compile_ptx(
    kernel: object, pointers: dict[str, str], scalars: dict[str, str], constants: dict, fusion: bool = True
) -> str:
    """PTX for an sm_90 GPU, with fused multiply-adds unless `fusion` says no."""
    compiler = pytest.importorskip("triton.compiler")
    backend = pytest.importorskip("triton.backends.compiler")
    signature = {**pointers, **scalars, **dict.fromkeys(constants, "constexpr")}
    source = compiler.ASTSource(kernel, signature, constants)
    target = backend.GPUTarget("cuda", 90, 32)
    return compiler.compile(source, target=target, options={"enable_fp_fusion": fusion}).asm["ptx"]


@pytest.mark.parametrize("number", ["fp32", "fp64"])
@pytest.mark.parametrize("data", ["fp32", "bf16"])
@pytest.mark.parametrize("ramped", [False, True])
def test_threshold_kernels_fuse_multiply_adds_in_sums_only(number: str, data: str, ramped: bool) -> None:
    pytest.importorskip("triton")
    from lightning_n2uq.ops.backends.triton import threshold

    types = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", "dx_ptr"), f"*{data}")
    types |= {"tables_ptr": f"*{number}", "sums_ptr": "*fp64", "numel": "i64"}
    constants = {"RAMPED": ramped, "HELD": 16, "CHUNKS": 1, "FIFTEEN": True, "LANES": 128}
    ptx = _threshold_ptx(threshold._forward_kernel, types, constants)
    assert "fma.rn.f32" not in ptx
    assert data == "fp32" or "cvt.rn.bf16" in ptx
    constants |= {"CENTRED": False, "WRITES": True}
    ptx = _threshold_ptx(threshold._backward_kernel, types, constants)
    assert "ftz" not in ptx
    assert ptx.count(f"fma.rn.f{number[2:]}") >= 4 * 16  # sums of sixteen widths, four values a thread
    if number == "fp32":
        assert ptx.count("fma.rn.sat.f32") >= 4 * 16  # the share of every segment that lies below a value


def _threshold_ptx(kernel: object, types: dict[str, str], constants: dict) -> str:
    names = [name for name in kernel.arg_names if name not in constants]  # type: ignore[attr-defined]
    return compile_ptx(kernel, {name: types.get(name, "i32") for name in names}, {}, constants)


@pytest.mark.parametrize(("number", "factor"), [("fp32", 0.0), ("fp32", 1.75), ("fp64", 0.0)])
def test_weight_kernel_compiles_to_ieee_arithmetic(number: str, factor: float) -> None:
    pytest.importorskip("triton")
    from lightning_n2uq.ops.backends.triton import weight

    pointers = dict.fromkeys(("weight_ptr", "quantized_ptr", "scale_ptr"), f"*{number}")
    constants = {"N": 3, "MAGIC": 1.5 * 2.0 ** (23 if number == "fp32" else 52), "TILE": 1024}
    constants["FACTOR"] = factor
    ptx = compile_ptx(weight._kernel, pointers, {"row_length": "i64"}, constants)
    assert f"div.rn.f{number[2:]}" in ptx
    assert "ftz" not in ptx
    assert "fma.rn" not in ptx


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_cuda_gives_the_bits_of_the_cpu(bits: int) -> None:
    n = 2**bits - 1
    values = (torch.tensor([0.1]), (0.2 + torch.rand(n)) * 2 / n, torch.tensor([1.3]), torch.tensor([0.7]))
    x, grad = torch.randn(1_000_003) + 0.5, torch.randn(1_000_003)
    results = []
    for device, kernels in (("cpu", "auto"), ("cuda", "triton")):
        leaves = [t.to(device).requires_grad_() for t in (x, *values)]
        with force(kernels):
            y = threshold_quantize(*leaves)
            grads = torch.autograd.grad(y, leaves, grad.to(device))
        results.append([t.cpu() for t in (y, *grads)])
    for here, there in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(here, there)
    for here, there in zip(results[0][2:], results[1][2:], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_weights_equal_the_reference() -> None:
    weight = torch.randn(64, 32, 3, 3, device="cuda")
    results = []
    for kernels in ("reference", "triton"):
        with force(kernels):
            results.append(quantize_weight(weight, 3))
    assert torch.equal(*results)
