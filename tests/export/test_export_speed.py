import json

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

from benchmarks import __main__ as benchmarks
from benchmarks import export_speed
from lightning_n2uq.export import describe
from lightning_n2uq.export.formats.onnx_file import to_onnx


def test_networks_take_turns_and_their_tables_render(small_network, capsys):
    shape = (3, 16, 16)
    files = {
        name: to_onnx(describe(small_network(bits, bits, in_channels=3), shape)).SerializeToString()
        for name, bits in ((export_speed.BASE, 2), ("W4A4", 4))
    }
    result = export_speed.measure(files, 0.01, 16, threads=(1, 2), batches=(2,))
    printed = capsys.readouterr().out
    assert "2 x 16x16, threads: 2" in printed
    assert "milliseconds by operator" in printed
    assert result["threads 1, batch 2"][export_speed.BASE]["ratio"] == 1
    assert result["threads 2, batch 2"]["W4A4"]["rounds"] >= 3
    profiles = result["profile_ms"]
    assert profiles["W4A4"]["MatMulInteger"] > 0
    assert profiles["W4A4"]["GatherElements"] > 0
    assert "GatherElements" not in profiles[export_speed.BASE]
    total = sum(value for kind, value in profiles["W4A4"].items() if kind != "all")
    assert profiles["W4A4"]["all"] == pytest.approx(total, abs=0.02)
    json.dumps(result)


def test_export_is_a_topic_with_small_inputs():
    assert benchmarks.TOPICS["export"] is export_speed.run
    assert benchmarks.QUICK["export"]["size"] == 64
