"""The campaign itself: seeds that once found something, and whether it would notice."""

import copy

import chaos_faults
import chaos_jobs
import pytest
from chaos_trial import LostError, Record, Reference, differing, reference, trial

FAILED_ONCE = {24: "steps", 26: "steps", 46: "accumulated", 49: "accumulated"}
"""Seeds whose trial was lost when it was first run, and their jobs."""


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    cache = folder / "kernels"
    cache.mkdir()
    return {"digits": reference(folder / "digits", "digits", cache)}, cache


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_trial_ends_exactly_or_says_why_not(whole, tmp_path, seed):
    record = trial(seed, tmp_path / f"seed{seed}", *whole)
    assert record.outcome in ("exact", "named"), record


@pytest.mark.slow
@pytest.mark.parametrize("seed", FAILED_ONCE)
def test_a_trial_that_was_lost_once_is_exact(whole, tmp_path, seed):
    job, cache = FAILED_ONCE[seed], whole[1]
    record = trial(seed, tmp_path / f"seed{seed}", {job: reference(tmp_path / "whole", job, cache)}, cache)
    assert record.outcome == "exact", record


@pytest.mark.slow
def test_another_result_is_noticed(whole, tmp_path):
    references, cache = whole
    wanted = references["digits"]
    altered = copy.deepcopy(wanted.state)
    name = next(iter(altered["state_dict"]))
    altered["state_dict"][name].view(-1)[0] += 1e-6
    record = trial(1, tmp_path / "seed1", {"digits": Reference(altered, wanted.rows, wanted.seconds)}, cache)
    assert record.outcome == "lost"
    assert name in record.detail
    fewer = {"digits": Reference(wanted.state, wanted.rows[:-1], wanted.seconds)}
    record = trial(2, tmp_path / "seed2", fewer, cache)
    assert (record.outcome, "metrics.csv" in record.detail) == ("lost", True)


@pytest.mark.parametrize("job", sorted(chaos_jobs.JOBS))
def test_every_job_is_a_config_of_the_command(tmp_path, job):
    import yaml

    chaos_jobs.write(tmp_path, job)
    config = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert config["trainer"].get("devices") == chaos_jobs.ranks(job)
    assert (tmp_path / "images").exists() == (job == "images")
    assert {"signal", "damaged checkpoint"} <= set(chaos_faults.possible(job, chaos_jobs.ranks(job)))


def test_differences_are_found_at_any_depth():
    assert differing({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ["/a/1/b"]
    assert differing({"a": [1]}, {"a": [1, 2]}) == ["/a"]
    assert Record(3).as_dict()["seed"] == 3
    assert issubclass(LostError, Exception)
