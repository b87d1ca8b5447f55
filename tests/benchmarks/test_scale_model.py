"""The model of gradient synchronisation: its bytes, its limits, and the saved measurements."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scale import __main__ as command
from benchmarks.scale import error, tables, validate
from benchmarks.scale.speeds import speeds_from
from lightning_n2uq.scaling import volume
from lightning_n2uq.scaling.cluster import Cluster, Link, Speeds
from lightning_n2uq.scaling.methods import METHODS
from lightning_n2uq.scaling.volume import shapes

RESULTS = Path(command.__file__).parent.parent / "results"
SAVED = json.loads((RESULTS / "scale.json").read_text())
NETLAB = json.loads((RESULTS / "netlab.json").read_text())
RATES = {2: 2.0, 3: 1.5, 4: 2.0, 8: 2.0}
SPEEDS = Speeds(RATES, RATES, half=4.0, powersgd=0.5, reduce=5.0)
NUMEL = 5_000_000


@pytest.mark.parametrize("name", METHODS)
def test_one_rank_costs_nothing(name):
    assert METHODS[name](NUMEL, Cluster(1, Link(1.0)), SPEEDS) == 0.0


@pytest.mark.integration
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(METHODS)), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.floats(0.01, 400.0)
)
def test_more_bandwidth_or_less_latency_never_slows(name, nodes, per_node, gbit):
    cluster = Cluster(nodes * per_node, Link(gbit), per_node)
    seconds = METHODS[name](NUMEL, cluster, SPEEDS)
    assert METHODS[name](NUMEL, replace(cluster, inter=Link(2 * gbit)), SPEEDS) <= seconds
    assert METHODS[name](NUMEL, replace(cluster, inter=Link(gbit, 0.0)), SPEEDS) <= seconds
    assert METHODS[name](2 * NUMEL, cluster, SPEEDS) >= seconds


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 100, 1024])
def test_two_phase_bytes_follow_the_formula(bits, ranks):
    numel = 25_600_000
    first, second, units = volume.two_phase_bytes(numel, bits, ranks)
    ideal = volume.ideal_two_phase_bytes(numel, bits, ranks)
    # What is above the formula: whole buckets per rank in the last unit, and alignment to 16 bytes.
    whole = 1024 * ranks * (bits + 1) / 8 + units * 2 * 16 * ranks
    assert ideal * 0.999 <= first + second <= ideal * 1.03 + whole


def test_bytes_per_rank_do_not_grow_with_the_ranks_but_all_gather_does():
    sent = [sum(volume.two_phase_bytes(1 << 25, 4, ranks)[:2]) for ranks in (16, 64, 256, 1024)]
    assert max(sent) < 1.1 * min(sent)
    assert volume.all_gather_bytes(1 << 25, 4, 1024) > 60 * volume.all_gather_bytes(1 << 25, 4, 16)


def test_powersgd_numel_counts_both_factors_and_whole_vectors():
    # One weight [64, 64, 3, 3] and two vectors of 64 are all that 37,000 coordinates make.
    assert len(shapes(36_900)) == 3
    assert volume.powersgd_numel(36_900) == 64 + 576 + 64 + 64


def test_network_bound_time_is_bytes_over_bandwidth():
    cluster = Cluster(4, Link(0.01, 0.0), framing=1.0)
    assert METHODS["ddp"](NUMEL, cluster, SPEEDS) == pytest.approx(1.5 * 4 * NUMEL * 8 / 1e7, rel=0.01)
    expected = volume.ideal_two_phase_bytes(NUMEL, 4, 4) * 8 / 1e7
    assert METHODS["nuqsgd"](NUMEL, cluster, SPEEDS) == pytest.approx(expected, rel=0.03)


def test_nodes_save_what_their_ranks_would_send_over_one_link():
    cluster = Cluster(64, Link(1.0), ranks_per_node=8)
    assert METHODS["nuqsgd_nodes"](NUMEL, cluster, SPEEDS) < METHODS["nuqsgd"](NUMEL, cluster, SPEEDS) / 4
    alone = Cluster(8, Link(1.0))
    assert METHODS["nuqsgd_nodes"](NUMEL, alone, SPEEDS) == METHODS["nuqsgd"](NUMEL, alone, SPEEDS)


def test_break_even_is_where_times_meet():
    gbit = tables.break_even_gbit("nuqsgd", "ddp", 8, SPEEDS)
    assert 0.1 < gbit < 1000.0
    ours, theirs = (METHODS[name](tables.NUMEL, Cluster(8, Link(gbit)), SPEEDS) for name in ("nuqsgd", "ddp"))
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(0.0), "gbit: got 0.0"),
        (lambda: Link(1.0, -1.0), "latency_s: got -1.0"),
        (lambda: Cluster(0, Link(1.0)), "ranks: got 0"),
        (lambda: Cluster(6, Link(1.0), 4), "ranks_per_node: got 4, allowed are divisors of 6"),
    ],
)
def test_impossible_clusters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_model_meets_the_measurements_within_a_fifth(hosts):
    """Every method and every link that was timed."""
    points = [p for p in validate.points(SAVED, NETLAB) if p["hosts"] == hosts]
    assert len(points) >= 6
    worst = max(points, key=lambda p: abs(p["error"]))
    assert abs(worst["error"]) < 0.2, worst


def test_measured_bytes_do_not_grow_with_the_ranks():
    """Counted at the collective: within 7 % of the formula on 2 to 16 ranks."""
    rows = [r for key, part in SAVED.items() if key.startswith("bytes:") for r in part]
    counted = {r["hosts"]: r for r in rows if r["method"] == "nuqsgd"}
    assert set(counted) == {2, 4, 8, 16}
    for hosts, row in counted.items():
        ideal = volume.ideal_two_phase_bytes(row["numel"], 4, hosts)
        assert ideal <= row["collective_bytes"] < 1.07 * ideal, hosts


@pytest.mark.parametrize("name", ["4 bits", "2 bits, linf, buckets of 256"])
def test_error_follows_the_expectation_and_stays_below_the_bound(name):
    """With few ranks the first mean lies near the levels, so the second half adds less than expected."""
    for ranks in (2, 64):
        found = error.measure(name, ranks, numel=1 << 14, trials=3)
        assert found["first"] < found["both"] < min(1.1 * found["expected"], found["bound"])
    assert found["both"] == pytest.approx(found["expected"], rel=0.1)


def test_first_half_falls_with_the_ranks_and_the_second_is_a_floor():
    few, many = (error.measure("4 bits", ranks, noise=0.0, numel=1 << 14, trials=3) for ranks in (2, 32))
    assert few["first"] / many["first"] == pytest.approx(16, rel=0.2)
    assert many["both"] > 10 * many["first"]


def test_error_feedback_falls_faster_than_averaging():
    off, on = (error.feedback_error(16, feedback, ranks=4, numel=1 << 13) for feedback in (False, True))
    assert on < off / 3


def test_command_answers_for_one_cluster(capsys):
    command.main(["--ranks", "16", "--gbit", "1", "--per-node", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(METHODS)
    assert any(line.startswith("nuqsgd_nodes") for line in lines)


@pytest.mark.integration
def test_command_writes_tables_and_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command.main(["--plot", str(tmp_path / "scaling.svg")])
    text = capsys.readouterr().out
    assert "1024" in text
    assert "nan" not in text
    assert (tmp_path / "scaling.svg").stat().st_size > 10_000


def test_speeds_survive_json():
    again = speeds_from(json.loads(json.dumps(SPEEDS.__dict__)))
    assert again == SPEEDS
    assert all(math.isfinite(rate) for rate in speeds_from(SAVED["speeds"]).encode.values())
    assert torch.tensor(list(speeds_from(SAVED["speeds"]).decode)).tolist() == [2, 3, 4, 8]
