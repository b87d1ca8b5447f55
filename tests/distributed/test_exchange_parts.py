import subprocess
import sys
import time
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import StrategyRegistry
from torch import nn

from lightning_n2uq.compression import IdentityCodec, NUQCodec
from lightning_n2uq.distributed.agreed_buffers import AgreedBuffers
from lightning_n2uq.distributed.collectives import require_agreement
from lightning_n2uq.distributed.exchange import count_nonfinite
from lightning_n2uq.distributed.partition import Span, clip_ranges, split_chunks, split_units
from lightning_n2uq.distributed.pipeline import Pipeline
from lightning_n2uq.distributed.residuals import Residuals, state_for_rank
from lightning_n2uq.distributed.resume_layout import ResumeLayout
from lightning_n2uq.distributed.stats import ExchangeStats, busy_seconds
from lightning_n2uq.strategies import (
    ExchangeConfig,
    NUQSGDState,
    NUQSGDStrategy,
    TorchHookStrategy,
    nuqsgd_hook,
)


@given(
    numel=st.integers(1, 5000),
    parts=st.integers(1, 5),
    align=st.sampled_from([8, 64, 256]),
    cut=st.integers(1, 3000),
    exact=st.integers(0, 5000),
)
def test_cuts_cover_everything_at_codec_buckets(numel, parts, align, cut, exact):
    whole = Span(0, numel, clip_ranges([(exact, 100)], 0, numel))
    units = split_units(whole, cut, align * parts)
    assert [unit.start for unit in units[1:]] == [unit.stop for unit in units[:-1]]
    assert units[-1].stop == numel
    seen = 0
    for unit in units:
        chunks = split_chunks(unit, parts, align)
        assert len(chunks) == parts
        assert sum(chunk.numel for chunk in chunks) == unit.numel
        assert all(chunk.start % align == 0 for chunk in chunks if chunk.numel)
        seen += sum(length for chunk in chunks for _, length in chunk.exact)
    assert seen == sum(length for _, length in whole.exact)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scheme": "ring"}, "scheme"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"min_numel": 1.5}, "min_numel"),
        ({"ranks_per_node": 0}, "ranks_per_node"),
        ({"bits": 5}, "bits"),
        ({"scheme": "all_gather", "second_phase_bits": 8}, "second_phase_bits"),
        ({"error_feedback": True, "bits": 2}, "error_feedback"),
        ({"error_feedback": True, "second_phase_bits": 2}, "error_feedback"),
    ],
)
def test_impossible_settings_name_the_argument(settings, name):
    with pytest.raises(ValueError, match=name):
        ExchangeConfig(**settings)
    with pytest.raises(ValueError, match=name):
        NUQSGDStrategy(**settings)


def test_unknown_settings_fail():
    with pytest.raises(TypeError, match="bitz"):
        NUQSGDState(bitz=4)


def test_patterns_need_names_and_must_match():
    with pytest.raises(ValueError, match="module"):
        NUQSGDState(skip_patterns=["*.bias"])
    with pytest.raises(ValueError, match="nothing"):
        NUQSGDState(skip_patterns=["nothing*"], module=nn.Linear(2, 2))


def test_skip_patterns_and_small_parameters_travel_exactly():
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 2))
    state = NUQSGDState(skip_patterns=["1.*"], min_numel=200, module=module)
    exact = [state._travels_exactly(parameter) for parameter in module.parameters()]
    assert exact == [False, True, True, True, True, True]


@pytest.mark.parametrize("name", ["nuqsgd", "nuqsgd_2bit", "nuqsgd_3bit", "nuqsgd_8bit", "qsgd", "qsgd_inf"])
def test_registered_variants(name):
    strategy = StrategyRegistry.get(name)
    assert isinstance(strategy, NUQSGDStrategy)
    assert strategy.config.bits == {"nuqsgd_2bit": 2, "nuqsgd_3bit": 3, "nuqsgd_8bit": 8}.get(name, 4)
    few = name == "nuqsgd_3bit"
    assert strategy.config.norm == ("linf" if few or name == "qsgd_inf" else "l2")
    assert strategy.config.bucket_size == (256 if few else 1024)
    assert strategy.config.rotation == ("hadamard" if name == "nuqsgd_2bit" else "none")


@pytest.mark.parametrize("name", ["alq", "amq", "terngrad", "natural", "signsgd", "topk"])
def test_registered_baselines(name):
    config = StrategyRegistry.get(name).config
    assert config.method == name
    assert config.error_feedback == (name in ("signsgd", "topk"))
    assert config.codec().describe().startswith({"signsgd": "sign("}.get(name, name))


@pytest.mark.parametrize(("name", "bits"), [("", 4), ("_2bit", 2), ("_1bit", 1)])
def test_registered_rotated_variants(name, bits):
    config = StrategyRegistry.get(f"nuqsgd_rotated{name}").config
    assert (config.bits, config.bucket_size, config.rotation) == (bits, 1024, "hadamard")
    assert config.rounding == ("stochastic" if bits == 4 else "eden")


@pytest.mark.parametrize("hook", ["fp16", "bf16", "powersgd"])
def test_registered_torch_hooks(hook):
    strategy = StrategyRegistry.get(f"ddp_{hook}")
    assert isinstance(strategy, TorchHookStrategy)
    assert strategy.hook == hook


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"hook": "int8"}, "hook"),
        ({"powersgd_rank": 0}, "powersgd_rank"),
        ({"powersgd_start": 1}, "powersgd_start"),
    ],
)
def test_torch_hook_arguments(arguments, name):
    with pytest.raises(ValueError, match=name):
        TorchHookStrategy(**arguments)


class DeepSpeedEngine(nn.Module):
    """Stands for the library's class, which is recognised by name."""


def test_sharded_training_is_refused():
    with pytest.raises(ValueError, match="DeepSpeedEngine"):
        NUQSGDState(module=DeepSpeedEngine())
    with pytest.raises(ValueError, match="GradBucket"):
        nuqsgd_hook(NUQSGDState(), torch.zeros(3))  # what FSDP hands to hooks


def test_handshake_names_rank_and_values():
    records = [{"bits": 4, "version": "1"}, {"bits": 4, "version": "1"}, {"bits": 4, "version": "2"}]
    require_agreement(records[:2], [0, 1])
    with pytest.raises(ValueError, match=r"`version`: rank 0 has '1', rank 7 has '2'"):
        require_agreement(records, [0, 3, 7])


def _saved(**changes):
    return {
        "step": 5,
        "seed": 0,
        "layout": [["b"], ["a"]],
        "geometry": {"world_size": 2},
        "averaged": [1, 2],
        "names": ["a", "b"],
        "numels": [1, 2],
        "gradient": torch.empty(2, 0),
        "first_leg": torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]),
        "second_leg": torch.tensor([0.5, 0.0, 0.0]),
    } | changes


def test_residuals_on_another_number_of_ranks():
    own = state_for_rank(_saved(), 1, 2)
    assert own["step"] == 5
    assert own["owed"]["legs"][0]["b"].tolist() == [4.0, 5.0]
    assert own["owed"]["legs"][1]["a"].tolist() == [0.5]
    assert own["owed"]["layout"] == [["b"], ["a"]]
    with pytest.warns(UserWarning, match="2 ranks are averaged for 3"):
        mean = state_for_rank(_saved(), 0, 3)
    assert mean["owed"]["gradient"]["a"].tolist() == [2.5]  # an error in the mean is owed by both ranks
    assert mean["owed"]["legs"] == []
    pending = _saved(gradient=torch.ones(2, 3), first_leg=torch.empty(2, 0), second_leg=torch.empty(0))
    assert state_for_rank(pending, 0, 2)["owed"]["gradient"]["b"].tolist() == [1.0, 1.0]
    with warnings.catch_warnings():  # nothing to average, nothing to say
        warnings.simplefilter("error")
        nothing = {
            "gradient": torch.empty(2, 0),
            "first_leg": torch.empty(2, 0),
            "second_leg": torch.empty(0),
        }
        state_for_rank(_saved(names=[], numels=[], averaged=[], **nothing), 0, 3)


def test_state_of_an_earlier_revision_is_refused_in_one_line():
    with pytest.raises(ValueError, match="its entry 'nuqsgd' has step, residuals; this version cannot"):
        state_for_rank({"step": 1, "residuals": torch.ones(2, 3)}, 0, 2)


def test_residuals_of_phases_become_pending():
    residuals = Residuals(
        {"w": torch.tensor([1.0])}, [{"w": torch.tensor([2.0])}, {"w": torch.tensor([0.25])}], [1, 4]
    )
    residuals.make_pending()
    assert residuals.pending["w"].tolist() == [4.0]
    assert residuals.phases == []


def test_state_dict_round_trip():
    state = NUQSGDState()
    residuals = Residuals({"w": torch.ones(2)}, [{"w": torch.zeros(2)}], [1], (("w",),), {"world_size": 2})
    state.load_state_dict({"step": 3, "seed": 0, "owed": residuals.state_dict()})
    assert state.step == 3
    again = Residuals.restore(state.state_dict()["owed"])
    assert again.pending["w"].tolist() == [1.0, 1.0]
    assert (again.layout, again.geometry, again.averaged) == (residuals.layout, residuals.geometry, [1])


def test_busy_seconds_and_steps():
    assert busy_seconds([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == 4.0
    stats = ExchangeStats()
    stats.begin(100)
    stats.add(encode_s=1.0)
    stats.close(step=3, sent_bytes=50, world_size=2)
    assert stats.last.step == 3
    assert stats.last.full_bytes == 400.0
    assert stats.last.relative_error is None


def test_nonfinite_buckets_are_counted():
    values = torch.zeros(1000)
    assert count_nonfinite(values, 256) == 0
    values[[3, 5, 999]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    assert count_nonfinite(values, 256) == 2


class Recorder:
    """A task that notes its stages and may fail in one."""

    def __init__(self, log, name, fails_at=None):
        self.log, self.name, self.fails_at = log, name, fails_at
        self.done = torch.futures.Future()

    def run(self, stage):
        if stage == self.fails_at:
            raise RuntimeError("broken")
        self.log.append((stage, self.name))
        if stage == 2:
            self.done.set_result(None)

    def fail(self, error):
        self.done.set_exception(error)


def test_pipeline_keeps_the_order_in_every_stage_and_reports_errors():
    log = []
    pipeline = Pipeline(3, torch.device("cpu"), lambda error: RuntimeError(f"explained: {error}"))
    tasks = [Recorder(log, name) for name in range(20)]
    for task in tasks:
        pipeline.submit(task)
    tasks[-1].done.wait()
    for stage in range(3):
        assert [name for at, name in log if at == stage] == list(range(20))
    broken = Recorder(log, "broken", fails_at=1)
    pipeline.submit(broken)
    with pytest.raises(RuntimeError, match="explained: broken"):
        broken.done.wait()
    late = Recorder(log, "late")
    pipeline.submit(late)
    with pytest.raises(RuntimeError, match="explained: broken"):
        late.done.wait()
    pipeline.close()


def test_pipeline_holds_no_task_that_is_done_and_ends_its_threads():
    pipeline = Pipeline(3, torch.device("cpu"), lambda error: error)
    task = Recorder([], "one")
    pipeline.submit(task)
    done, alive = task.done, weakref.ref(task)
    done.wait()
    del task
    deadline = time.monotonic() + 5
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive() is None
    pipeline.close()
    assert not any(thread.is_alive() for thread in pipeline._threads)


@pytest.mark.integration
def test_a_process_that_ends_lets_its_exchange_finish():
    """A thread that frees a tensor while the interpreter ends would abort the process."""
    code = """
import time, torch
from lightning_n2uq.distributed.pipeline import Pipeline
class Task:
    def run(self, stage):
        time.sleep(0.3)
        self.tensor = torch.zeros(3)
        print("stage", stage, flush=True)
    def fail(self, error): print(error, flush=True)
kept = Pipeline(2, torch.device("cpu"), lambda error: error)
kept.submit(Task())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "stage 0\nstage 1\n"), done.stderr


def test_second_codec():
    assert (
        ExchangeConfig(bits=2, second_phase_bits=8).second_codec().describe() == NUQCodec(bits=8).describe()
    )
    assert IdentityCodec().describe() != NUQCodec().describe()


def test_strategy_names_missing_ranks_in_other_errors():
    strategy = NUQSGDStrategy()
    strategy.state = NUQSGDState()
    error = RuntimeError("connection closed by peer")
    strategy.on_exception(error)
    assert str(error) == "connection closed by peer"
    strategy.state = type("Lost", (), {"report": lambda self, error: "rank 2 is gone"})()
    strategy.on_exception(error)
    assert str(error) == "connection closed by peer [rank 2 is gone]"


def bucket_of(buffer, parameters, gradients):
    """What DDP hands to a hook."""
    return SimpleNamespace(buffer=lambda: buffer, parameters=lambda: parameters, gradients=lambda: gradients)


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_exchange_of_held_buckets_reaches_who_waits_for_them(fails):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size)) for size in (3, 4, 5)]
    names = ["a", "b", "c"]
    layout = ResumeLayout()
    buffers = [torch.arange(7.0), torch.arange(5.0)]
    buckets = [
        bucket_of(buffers[0], parameters[:2], [buffers[0][:3], buffers[0][3:]]),
        bucket_of(buffers[1], parameters[2:], [buffers[1]]),
    ]
    waiting = [
        layout.hold(bucket, part) for bucket, part in zip(buckets, (names[:2], names[2:]), strict=True)
    ]

    def start(index, chosen, gradient, last):
        future = torch.futures.Future()
        if fails and last:
            future.set_exception(RuntimeError("the link broke"))
        else:
            future.set_result(gradient + 1)
        return future

    layout.release([["c", "a"], ["b"]], start)
    for future, expected in zip(waiting, (torch.arange(7.0) + 1, torch.arange(5.0) + 1), strict=True):
        if fails:
            with pytest.raises(RuntimeError, match="the link broke"):
                future.wait()
        else:
            assert torch.equal(future.wait(), expected)


def test_buffers_get_the_mean_of_what_they_rose_and_fell_by(monkeypatch):
    """The other rank's buffer rose by 1 everywhere."""
    module = nn.BatchNorm1d(4)
    module.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, float("inf")]))
    buffers = AgreedBuffers(module)
    buffers.follow()
    module.running_mean += torch.tensor([0.5, -0.5, 0.0, 0.0])

    def add_the_other(values, op=dist.ReduceOp.SUM, group=None):
        if values.is_floating_point():
            values -= torch.tensor([1.0, 1.0, 1.0, 0.0])  # changes travel as agreed - buffer

    monkeypatch.setattr(dist, "all_reduce", add_the_other)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0])
    assert buffers.average(None, torch.device("cpu")) == 4
    assert module.running_mean.tolist() == [1.75, 2.25, 3.5, float("inf")]
