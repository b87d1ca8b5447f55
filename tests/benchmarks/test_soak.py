"""The soak: what it calls flat, and a short one."""

import json

import pytest

from benchmarks import soak


def samples(**slopes):
    """Ten steps apart; everything constant but what is given as growth per step."""
    base = {
        "memory_mb": 400.0,
        "files": 20.0,
        "threads": 9.0,
        "cpu_ms": 50.0,
        "step_ms": 60.0,
        "seconds": 1.0,
    }
    return [
        {"step": step} | {name: value + slopes.get(name, 0.0) * step for name, value in base.items()}
        for step in range(10, 1010, 10)
    ]


def test_constant_is_flat():
    assert soak.not_flat(soak.growth(samples())) == []


@pytest.mark.parametrize(
    ("name", "slope"),
    [("memory_mb", 0.002), ("files", 0.01), ("threads", 0.01), ("cpu_ms", 0.02), ("step_ms", 0.1)],
)
def test_growth_is_found(name, slope):
    assert soak.not_flat(soak.growth(samples(**{name: slope}))) == [name]


def test_memory_slope_is_in_megabytes_per_thousand_steps():
    assert soak.growth(samples(memory_mb=0.002))["memory_mb"] == pytest.approx(2.0)


def test_warm_up_and_single_outliers_do_not_count():
    found = samples()
    for early in found[:15]:
        early["memory_mb"] = 100.0
    found[60]["step_ms"] = 1e6  # stopped for a while
    assert soak.not_flat(soak.growth(found)) == []


def test_unmeasurable_growth_is_not_flat():
    assert soak.not_flat(dict.fromkeys(soak.LIMITS, float("nan"))) == list(soak.LIMITS)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="samples: got 3, allowed are 10 or more"):
        soak.growth(samples()[:3])
    with pytest.raises(ValueError, match="xs: got 1 points"):
        soak.slope([1.0], [1.0])


@pytest.mark.slow
def test_short_soak_counts_every_rank(tmp_path):
    """Too short to judge times; handles and threads must be flat, memory must not run away."""
    output = tmp_path / "soak.json"
    soak.main(["--minutes", "1", "--ranks", "2", "--every", "5", "--output", str(output)])
    result = json.loads(output.read_text())
    assert len(result["samples"]) == 2
    for grew in result["growth"]:
        assert grew["files"] <= 0
        assert grew["threads"] <= 0
        assert grew["memory_mb"] < 50
