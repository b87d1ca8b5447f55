"""`n2uq doctor` names versions, devices, kernels with their reasons, and what is missing."""

import pytest

from lightning_n2uq import doctor
from lightning_n2uq.ops.dispatch import force


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


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, absent = doctor._version, ("numba", "jsonargparse")
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in absent else real(name))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "missing, and needed\n  jsonargparse" in text
    assert "numba          CPU kernels" in text


def test_check_compares_kernels_with_the_oracle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main(["--check"]) == 0

    def fail(name: str, device: str) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(doctor, "_compare", fail)
    assert doctor.main(["--check"]) == 1
    assert "threshold on cpu: RuntimeError: no compiler" in capsys.readouterr().out
