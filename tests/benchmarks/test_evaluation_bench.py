import pytest
import torch

from benchmarks import evaluation

pytestmark = pytest.mark.integration


def test_float_and_integer_networks_take_turns(capsys):
    result = evaluation.run(torch.device("cpu"), 0.01, batch=1, size=32)
    assert {evaluation.BASE, "float, channels-last", "W2A2", "W4A4"} <= set(result["time"])
    assert result["time"]["W2A2"]["rounds"] >= 3
    assert {"stem", "int_conv", "pass"} <= set(result["profile_ms"]["W4A4"])
    assert "processor flags" in capsys.readouterr().out
