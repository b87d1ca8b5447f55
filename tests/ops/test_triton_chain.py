"""The Triton kernels of the fused chain: interpreted against the reference, compiled, and run on a GPU."""

import copy

import pytest
import torch
from test_triton_quantizers import compile_ptx
from torch import nn
from triton_interpreter import interpret

from lightning_n2uq.backbones import resnet18
from lightning_n2uq.ops.dispatch import force

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.compiled
def test_triton_chain_equals_the_reference_under_the_interpreter() -> None:
    interpret("import triton_chain_cases; triton_chain_cases.check_all('cpu')")


MAPS = ("x_ptr", "y_ptr", "grad_ptr", "dx_ptr", "other_ptr", "dother_ptr")
CODED = {"N": 15, "BITS": 4}
STEM = {"KERNEL": 3, "STRIDE": 2, "PADDING": 1, "WIDE": False}
FINISH = {"SUMMED": 256, "CHANNELS": 8}
KERNELS = [
    ("fused_activation", "_forward_kernel", {**CODED, "HELD": 16, "NORM": True, "ACT": True}),
    ("codes", "_rebuild_kernel", {"N": 3, "BITS": 2}),
    ("fused_activation", "_sums_kernel", {**CODED, "HELD": 16, "NORM": True, "ACT": True}),
    ("fused_activation", "_input_kernel", {**CODED, "ACT": True}),
    ("channels", "_moments_kernel", {}),
    ("residual", "_forward_kernel", {"OTHER": True}),
    ("residual", "_sums_kernel", {"OTHER": True}),
    ("residual", "_input_kernel", {"OTHER": True}),
    ("channels", "_norm_kernel", {**FINISH, "FROM_SUMS": True}),
    ("channels", "_channels_kernel", {**FINISH, "NORM": True, "ACT": True}),
    ("stem", "_forward_kernel", {**STEM, "GROUP": 8}),
    ("stem", "_sums_kernel", STEM),
    ("stem", "_input_kernel", {**STEM, "GROUP": 8}),
]
# Shared by forward and backward pass, which have to compute the very same numbers, also where a compiler
# gives the kernels no options: no product may be fused with a sum.
EXACT = {"_forward_kernel", "_rebuild_kernel"}


@pytest.mark.parametrize(("module", "name", "constants"), KERNELS)
@pytest.mark.parametrize("data", ["fp32", "bf16"])
def test_chain_kernels_compile_for_a_gpu(module: str, name: str, constants: dict, data: str) -> None:
    pytest.importorskip("triton")
    import importlib

    kernel = getattr(importlib.import_module(f"lightning_n2uq.ops.backends.triton.{module}"), name)
    constants = {k: v for k, v in {**constants, "COLUMNS": 64, "LANES": 128}.items() if k in kernel.arg_names}
    types = dict.fromkeys(MAPS, f"*{data}") | {"packed_ptr": "*u8", "taps_ptr": "*u8"}
    types |= dict.fromkeys(("sums_ptr", "climbs_ptr", "other_sums_ptr"), "*fp64")
    names = [argument for argument in kernel.arg_names if argument not in constants]
    signature = {n: types.get(n, "*fp32") if n.endswith("_ptr") else "i32" for n in names}
    ptx = compile_ptx(kernel, signature, {}, constants, fusion=True)
    assert "ftz" not in ptx
    if name in EXACT:
        assert "fma.rn.f32" not in ptx


@needs_gpu
def test_the_chain_on_a_gpu_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton_chain_cases import check_all

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    check_all("cuda")


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_resnet18_trains_on_a_gpu_as_the_plain_network(compiled: bool) -> None:
    torch.manual_seed(0)
    plain = resnet18(2, 2, num_classes=10).cuda().train()
    fused = copy.deepcopy(plain)
    call = torch.compile(fused, fullgraph=True) if compiled else fused
    x, target = torch.randn(16, 3, 64, 64, device="cuda"), torch.randint(10, (16,), device="cuda")
    losses: list[list[float]] = []
    for model, network, kernels in ((plain, plain, "reference"), (fused, call, "auto")):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses.append([])
        with force(kernels):
            for _ in range(12):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = nn.functional.cross_entropy(network(x).float(), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(float(loss))
    assert losses[1][-1] < 0.5 * losses[1][0]
    assert abs(losses[0][0] - losses[1][0]) < 0.05 * losses[0][0]
    assert abs(losses[0][-1] - losses[1][-1]) < 0.3 * losses[0][0]
