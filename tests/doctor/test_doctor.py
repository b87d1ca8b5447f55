"""`n2uq doctor` names versions, devices, kernels with their reasons, and what is missing."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_n2uq import doctor, operator_check
from lightning_n2uq.ops import dispatch
from lightning_n2uq.ops.dispatch import force
from lightning_n2uq.utils import extras, processor

ROOT = Path(__file__).resolve().parents[2]


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for part in ("lightning_n2uq", "torch", "devices and threads", "threads", "kernels"):
        assert part in text
    lines = [line.split() for line in text.splitlines()]
    assert ["threshold_quantize", "cpu", "numba", "fastest", "on", "cpu"] in lines


def test_forced_kernels_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with force("reference"):
        doctor.main([])
    assert "forced by force()" in capsys.readouterr().out


def test_the_widths_of_integer_training_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processor, "flags", lambda: frozenset())
    doctor.main([])
    if dispatch.select("integer", torch.device("cpu")) == "onednn":
        expected = "training convolves integers up to 7 x 7, 8 x 6 bits (activations x weights)"
        assert expected in capsys.readouterr().out
    with force("numba"):
        doctor.main([])
    text = capsys.readouterr().out
    assert "training convolves floats on the cpu" in text
    assert "turned off by force()=numba" in text


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, absent = doctor._version, ("numba", "jsonargparse")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in absent else real(name))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "missing, and needed\n  jsonargparse" in text
    assert "numba          CPU kernels" in text


def test_every_extra_is_listed_with_what_installs_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "onnx")
    doctor.main([])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "timm           complete" in lines
    (export,) = (line for line in lines if line.startswith("export "))
    assert re.fullmatch(r"export +1 missing: pip install 'onnx>=[\d.]+'", export)
    assert {line.split()[0] for line in lines} >= set(extras.extras())


def test_no_message_names_this_package_on_an_index() -> None:
    folders = ("lightning_n2uq", "callbacks", "datamodules")
    sources = {path: path.read_text() for name in folders for path in (ROOT / name).rglob("*.py")}
    assert [path for path, text in sources.items() if re.search(r"pip install '?lightning_n2uq", text)] == []
    assert extras.how_to_install("timm").startswith("pip install 'timm>=")


def test_without_metadata_the_checkout_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "extras", lambda: {})
    assert extras.how_to_install("export") == "pip install '.[export]' in a checkout of this package"


def test_check_compares_every_operator_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(operator_check.CHECKS) == set(dispatch.MODULES)
    assert doctor.main(["--check"]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    for name in dispatch.MODULES:
        assert [name, "cpu", "as", "the", "reference"] in lines
    assert "failed" not in text


@pytest.mark.parametrize("name", list(operator_check.CHECKS))
def test_check_notices_wrong_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = operator_check.CHECKS[name], []

    def off(values: operator_check._Values) -> list[Tensor]:
        *first, last = real(values)
        calls.append(last)
        return [*first, last * 1.01 if len(calls) == 1 else last]  # the kernels come first

    monkeypatch.setitem(operator_check.CHECKS, name, off)
    with pytest.raises(ValueError, match="is not the reference's"):
        operator_check.compare(name, "cpu")


def test_check_reports_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, device: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(operator_check, "compare", fail)
    assert doctor.main(["--check"]) == 1
    assert "threshold_quantize on cpu: RuntimeError: no compiler" in capsys.readouterr().out
