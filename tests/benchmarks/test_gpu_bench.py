"""`python -m benchmarks.gpu` without a GPU: every topic runs on CPU tensors, with clocks that do not tell."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(call: Callable[[], object], rounds: int = 1) -> float:
        call()
        return float(rounds)

    def all_of(*calls: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for call in calls]

    monkeypatch.setattr(gpu, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(gpu, "SHAPES", ((2, 3, 4, 5),))
    monkeypatch.setattr(gpu, "NUMELS", (3000,))
    monkeypatch.setattr(gpu, "MAP", (2, 8, 6, 6))
    monkeypatch.setattr(gpu, "BATCH", 2)
    monkeypatch.setattr(gpu, "SIZE", 32)
    monkeypatch.setattr(gpu, "copy_rate", lambda: 1000.0)
    monkeypatch.setattr(gpu, "milliseconds", one)
    monkeypatch.setattr(gpu, "replayed", all_of)
    monkeypatch.setattr(gpu, "_peak", one)
    monkeypatch.setattr(gpu, "_kernels", lambda run: [("kernel", 1, one(run))])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_topic_runs_and_is_written(without_a_gpu: None, tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    assert gpu.main(["--no-compile", "--profile", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["quantizer"]["2x3x4x5 float32 4 bits"]["row_ms"] == 1 / gpu.CALLS
    assert results["codec"]["3000 4 bits encode"]["row_gb_per_s"] == round(4e-6 * 3000 * gpu.CALLS, 1)
    assert results["steps"]["eager"]["W2A2"]["ms_ratio"] == 1.0
    assert results["operators"]["stem, backward"]["row_ms"] == 1 / gpu.CALLS
    moved = 2 * 8 * 36 * 2 * (3 + 1 / 4)  # codes of four bits are a quarter of a map in bfloat16
    assert results["operators"]["chain, 4 bits, backward"]["ratio"] == pytest.approx(
        1e9 / 20 / moved, rel=1e-3
    )
    assert all(results[topic]["command"] for topic in ("quantizer", "codec", "operators", "steps"))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "needs a CUDA device, found none" in capsys.readouterr().err
