"""Choice of backends: automatic, by environment, forced, refused; one for both passes; equal signatures."""

import inspect

import pytest
import torch

from lightning_n2uq.ops import dispatch, threshold_quantize

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    dispatch._choose_from.cache_clear()
    yield
    dispatch._choose_from.cache_clear()  # what is installed changes in tests only


def reason(op, device):
    """Why `report` names the backend that it names."""
    return next(line.reason for line in dispatch.report() if (line.op, line.device) == (op, device.type))


def test_automatic_choice_follows_the_device(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda module: True)
    assert dispatch.select("nuq", CPU) == "numba"
    assert dispatch.select("nuq", CUDA) == "triton"
    assert dispatch.select("nuq", META) == "reference"


def test_missing_packages_fall_back_to_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda module: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, package in ((CPU, "numba"), (CUDA, "triton")):
        assert dispatch.select("nuq", device) == "reference"
        assert reason("nuq", device) == f"{package} is not installed"


def test_environment_forces_a_kernel(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert dispatch.select("nuq", CPU) == "reference"
    assert "LIGHTNING_N2UQ_KERNELS" in reason("nuq", CPU)


def test_unknown_environment_value_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cython")
    with pytest.raises(ValueError, match=r"LIGHTNING_N2UQ_KERNELS must be one of .*'cython'"):
        dispatch.select("nuq", CPU)


def test_force_wins_and_is_undone():
    with dispatch.force("reference"):
        assert dispatch.select("nuq", CPU) == "reference"
        with dispatch.force("auto"):
            assert reason("nuq", CPU) != "forced by force()"
        assert dispatch.select("nuq", CPU) == "reference"
    assert reason("nuq", CPU) != "forced by force()"
    with pytest.raises(ValueError, match="kernels must be one of"):
        dispatch.force("cython")


def test_forced_kernel_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "_installed", lambda module: True)
    with dispatch.force("triton"), pytest.raises(ValueError, match="need a cuda device"):
        dispatch.select("nuq", CPU)
    with dispatch.force("numba"), pytest.raises(ValueError, match="cpu only"):
        dispatch.select("nuq", CUDA)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with dispatch.force("triton"):
        assert dispatch.select("nuq", CPU) == "triton"


def test_report_has_a_reason_for_every_operator():
    lines = dispatch.report()
    assert {line.op for line in lines} >= {"nuq", "threshold_quantize", "quantize_weight"}
    assert all(line.reason for line in lines)


MAPS = ["forward", "backward", "empty_map"]
FUNCTIONS = {
    "threshold_quantize": ["forward", "backward"],
    "quantize_weight": ["quantize", "gradient"],
    "packed_activation": [*MAPS, "packed_shape", "codes_for_backward", "ordered", "rebuild"],
    "residual_block": MAPS,
    "stem": MAPS,
    "nuq": ["encode", "decode_mean"],
    "rotated": ["encode", "decode_mean"],
    "integer": ["obstacle", "prepare_conv2d", "conv2d", "prepare_linear", "linear"],
}
FAST = [(op, backend) for op in sorted(FUNCTIONS) for backend in ("numba", "triton") if op != "integer"]
FAST.remove(("rotated", "triton"))  # the reference runs on CUDA


def test_the_functions_of_every_operator_are_listed():
    assert set(FUNCTIONS) == set(dispatch.MODULES)


@pytest.mark.parametrize(("op", "backend"), [*FAST, ("integer", "onednn")])
def test_every_backend_has_the_functions_of_the_reference_with_its_arguments(op, backend):
    if backend != "onednn":  # torch itself has its operators
        pytest.importorskip(backend)
    plain, fast = (dispatch.load(op, CPU, name) for name in ("reference", backend))
    for function in FUNCTIONS[op]:
        arguments = [list(inspect.signature(getattr(m, function)).parameters) for m in (plain, fast)]
        assert arguments[0] == arguments[1], function


@pytest.mark.parametrize(("forward", "later"), [("reference", "numba"), ("numba", "reference")])
def test_the_backward_pass_runs_the_backend_of_the_forward_pass(monkeypatch, forward, later):
    pytest.importorskip("numba")
    called = []
    for name in (forward, later):
        module = dispatch.load("threshold_quantize", CPU, name)
        spied = lambda *given, name=name, run=module.backward: (called.append(name), run(*given))[1]  # noqa: E731
        monkeypatch.setattr(module, "backward", spied)
    x, one = torch.randn(9, requires_grad=True), torch.ones(1)
    with dispatch.force(forward):
        y = threshold_quantize(x, torch.zeros(1), torch.ones(3), one, one)
    with dispatch.force(later):
        y.sum().backward()
    assert called == [forward]
