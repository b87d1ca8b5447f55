"""`n2uq advise`: from a run's own figures to a table and one line."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_n2uq.cli.advise import main
from lightning_n2uq.compression import CODECS, IdentityCodec, NUQCodec
from lightning_n2uq.distributed import ExchangeConfig
from lightning_n2uq.scaling import advice
from lightning_n2uq.scaling.advice import Advisor, error_of_mean, recommendation
from lightning_n2uq.scaling.cluster import Link
from lightning_n2uq.scaling.measured import ERRORS, Measured, of_checkpoint, of_run
from lightning_n2uq.scaling.recorder import SAMPLE, Recorder, relative_error

LAB = Measured(
    ranks=4, coordinates=11_000_000, exact=10_000, step_s=1.2, sync_s=0.86, encode_s=0.1, decode_s=0.1,
    sent_bytes=8.9e6, link_mbit=95.0, latency_s=3e-4, relative_error=0.1, spread=2.0,
    errors={"nuqsgd": 0.1, "nuqsgd_2bit": 2.1, "nuqsgd_8bit": 0.0014},
)  # fmt: skip


def by_name(advisor):
    return {one.method: one for one in advisor.predictions()}


def metrics_of(measured):
    values = {f"comm/{name}": value for name, value in vars(measured).items() if name != "errors"}
    return values | {ERRORS + name: value for name, value in measured.errors.items()}


def write_run(folder, *rows):
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "train/loss", *metrics_of(LAB)])
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


def test_the_model_meets_what_the_run_has_measured():
    """4 bits over 95 Mbit/s: the network lab's figures, with the run's own link and codec."""
    predicted = by_name(Advisor(LAB))["nuqsgd"]
    assert predicted.sync_s == pytest.approx(LAB.sync_s, rel=0.2)
    assert predicted.sent_bytes == pytest.approx(LAB.sent_bytes, rel=0.1)
    assert predicted.step_s == pytest.approx(LAB.step_s, rel=0.15)


def test_methods_are_sorted_and_rounds_cost_a_period_th():
    found = Advisor(LAB, period=5).predictions()
    assert [one.step_s for one in found] == sorted(one.step_s for one in found)
    methods = by_name(Advisor(LAB, period=5))
    assert set(methods) == {"ddp", "ddp_fp16", "ddp_powersgd", "nuqsgd_local", *CODECS}
    assert methods["nuqsgd_local"].sync_s == methods["nuqsgd"].sync_s / 5
    assert methods["ddp"].sent_bytes == 1.5 * 4 * 11_000_000
    assert methods["nuqsgd_2bit"].bits == pytest.approx(2.03125, rel=1e-3)


def test_nodes_of_several_ranks_may_exchange_between_nodes_alone():
    methods = by_name(Advisor(LAB, Link(1.0), ranks=16, ranks_per_node=4))
    assert methods["nuqsgd hierarchical"].sync_s < methods["nuqsgd"].sync_s / 2
    assert "nuqsgd hierarchical" not in by_name(Advisor(LAB, Link(1.0), ranks=4, ranks_per_node=4))


def test_plain_ddp_is_taken_off_by_the_model():
    plain = replace(LAB, sync_s=0.0, encode_s=0.0, decode_s=0.0, step_s=6.0)
    advisor = Advisor(plain)
    assert 0.2 < advisor.compute_s < 0.8
    assert by_name(advisor)["ddp"].step_s == pytest.approx(6.0)


def test_the_error_of_a_mean_is_that_of_both_phases():
    assert error_of_mean(0.1, 1.0, 10**9) == pytest.approx(0.1)  # the floor
    assert error_of_mean(0.1, 2.0, 4) == pytest.approx(0.05 + 0.1 * 1.05)
    assert by_name(Advisor(LAB))["nuqsgd"].error == error_of_mean(0.1, 2.0, 4)
    assert by_name(Advisor(LAB))["qsgd"].error is None  # not measured
    assert by_name(Advisor(LAB))["ddp_powersgd"].error is None  # biased
    assert by_name(Advisor(replace(LAB, errors={"topk": 0.9})))["topk"].error is None  # biased, too


def test_the_line_names_the_fastest_that_is_exact_enough():
    found = Advisor(LAB).predictions()
    line = recommendation(found, 0.5, 10)
    assert line.startswith("What would pay: nuqsgd, 5.5 times as many steps per second as ddp; nuqsgd_local")
    assert "with period 10" in line
    assert recommendation(found, 10.0, 10).startswith("What would pay: nuqsgd_2bit, ")
    assert recommendation(found, 0.01, 10).startswith("What would pay: nuqsgd_8bit, ")


def test_on_a_fast_link_nothing_pays():
    found = Advisor(LAB, Link(400.0, 1e-6)).predictions()
    assert recommendation(found, 0.5, 10) == (
        "What would pay: nothing among them, ddp is within 5 % of the fastest"
    )


def test_figures_come_back_from_metrics_and_checkpoints(tmp_path):
    rows = [{"step": 0, "train/loss": 1.0}, {"step": 9, **metrics_of(replace(LAB, step_s=9.0))},
            {"step": 19, **metrics_of(LAB)}, {"step": 20, "train/loss": 0.5}]  # fmt: skip
    assert of_run(write_run(tmp_path, *rows)) == LAB
    torch.save({"callbacks": {"CommunicationMonitor": {"figures": metrics_of(LAB)}}}, tmp_path / "a.ckpt")
    assert of_checkpoint(str(tmp_path / "a.ckpt")) == LAB


def test_the_command_prints_a_table_and_a_line(tmp_path, capsys):
    folder = write_run(tmp_path, {"step": 9, **metrics_of(LAB)})
    assert main([folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 ranks, 1 per node, 11 M gradients, 95 Mbit/s, 0.34 s per step beside")
    assert lines[3].split() == ["this", "run", "-", "8.9", "0.86", "1.2", "0.1"]
    assert lines[-1].startswith("What would pay: nuqsgd, ")
    assert main([folder, "--mbit", "1000", "--ranks", "16", "--per_node", "4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {one["method"] for one in answer["methods"]} >= {"nuqsgd hierarchical", "ddp"}
    assert answer["measured"]["coordinates"] == 11_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run: got None, allowed is the folder of a run"),
        (["{run}", "--ckpt_path", "x"], "run: got '.*', allowed is the folder of a run, or else"),
        (["{run}/none"], "run: got '.*none', allowed is the folder of a run, with its metrics.csv"),
        (["{run}", "--period", "0"], "period: got 0, allowed are integers from 1"),
        (["{run}", "--mbit", "0"], "mbit: got 0.0, allowed is above 0"),
        (["{run}", "--ranks", "1"], "ranks: got 1, allowed are integers from 2"),
        (["{run}", "--ranks", "6", "--per_node", "4"], "ranks_per_node: got 4, allowed are divisors of 6"),
        (["--ckpt_path", "{run}/none.ckpt"], "ckpt_path: no such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    folder = write_run(tmp_path, {"step": 9, **metrics_of(LAB)})
    with pytest.raises(ValueError, match=message):
        main([argument.replace("{run}", folder) for argument in arguments])


def test_a_run_without_the_monitor_is_told_how(tmp_path):
    folder = write_run(tmp_path, {"step": 9, "train/loss": 1.0})
    with pytest.raises(ValueError, match="holds no figures of CommunicationMonitor, allowed is a run with"):
        of_run(folder)
    torch.save({"callbacks": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="holds no figures of CommunicationMonitor"):
        of_checkpoint(str(tmp_path / "a.ckpt"))


def test_a_run_of_one_rank_needs_a_link():
    alone = replace(LAB, ranks=1, link_mbit=0.0, sync_s=0.0)
    with pytest.raises(ValueError, match="mbit: got None, which needs a run of several ranks"):
        Advisor(alone)
    assert by_name(Advisor(alone, Link(0.1), ranks=4))["ddp"].step_s > alone.step_s


def test_the_recorder_counts_tries_codecs_and_takes_the_median(monkeypatch):
    net = nn.Sequential(nn.Linear(512, 600), nn.Linear(600, 3), nn.Linear(3, 3))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    recorder = Recorder()
    recorder.start(net, torch.device("cpu"), 1, ExchangeConfig(min_numel=256))
    total = sum(float(parameter.grad.square().sum()) for parameter in net.parameters())
    recorder.look_at(net.parameters(), 3.0 * total)
    now = iter([0.0, 50.0, 51.0, 52.0, 100.0, 107.0, 200.0, 202.0])
    monkeypatch.setattr("lightning_n2uq.scaling.recorder.time.perf_counter", lambda: next(now))
    for step in (1, 2, 3):
        recorder.begin_batch()
        recorder.end_batch(step)
        recorder.end_batch(step)  # a batch that only accumulates
    recorder.pause()
    for step in (4, 5):
        recorder.begin_batch()
        recorder.end_batch(step)
        recorder.pause()
    found = Measured.of(recorder.metrics(), "here")
    assert (found.coordinates, found.exact) == (309_615, 615)
    assert found.spread == pytest.approx(3.0)
    assert found.step_s == pytest.approx(1.5)  # of 1, 1, 7, 2; not of the first, which took 50
    assert set(found.errors) == set(CODECS)
    assert found.errors["nuqsgd_rotated_1bit"] == pytest.approx(0.57, abs=0.03)
    assert found.errors["nuqsgd"] == pytest.approx(0.1, abs=0.03)
    assert found.errors["nuqsgd_8bit"] < 0.01 < found.errors["nuqsgd_2bit"]


def test_the_recorder_counts_as_exact_what_the_settings_leave_in_full_precision():
    net = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4, bias=False))
    for settings, exact in (({}, 16 + 64), ({"min_numel": 1}, 16), ({"skip_patterns": ("0.*",)}, 592)):
        recorder = Recorder()
        recorder.start(net, torch.device("cpu"), 1, ExchangeConfig(**settings))
        assert recorder.metrics()["comm/exact"] == exact


def test_the_sample_is_bounded_and_errors_are_relative():
    values = torch.randn(SAMPLE)
    assert relative_error(IdentityCodec(), values) == 0.0
    assert relative_error(NUQCodec(4), values) == pytest.approx(relative_error(NUQCodec(4), 1e-20 * values))


def test_rates_are_the_run_s_where_it_compressed():
    slow = replace(LAB, encode_s=1.0, decode_s=1.0)
    assert Advisor(slow)._codec_rates() == pytest.approx((4e-3 * 11 * 1.25, 4e-3 * 11 * 2))
    assert Advisor(replace(LAB, encode_s=0.0))._codec_rates() == (advice._CODEC_RATE,) * 2
