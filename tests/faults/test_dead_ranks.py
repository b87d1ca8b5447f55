import os
import signal
import time

import pytest
from fault_job import WORLD
from fault_launch import Job, complete

TIMEOUT = 6.0
MERCY = 10.0  # seconds after the timeout in which every rank has to be gone
SURVIVORS = [0, 1, 3]


def messages(job, ranks=SURVIVORS):
    return [job.error(rank) for rank in ranks]


@pytest.mark.integration
def test_a_killed_rank_is_named_and_the_job_resumes(tmp_path):
    with Job(tmp_path, steps=1000, timeout=TIMEOUT) as job:
        job.wait_for(12)
        os.kill(job.pid(2), signal.SIGKILL)
        began = time.monotonic()
        assert job.end(SURVIVORS, TIMEOUT + MERCY) == [1, 1, 1], job.outputs()
        assert time.monotonic() - began < TIMEOUT  # a broken connection is seen at once
        for message in messages(job):
            assert "rank 2 is gone" in message
            assert "gradient exchange of step" in message
            assert not any(f"rank {rank} is gone" in message for rank in SURVIVORS), message
    complete(tmp_path)


@pytest.mark.integration
def test_a_stopped_rank_is_named_after_the_timeout(tmp_path):
    with Job(tmp_path, steps=1000, timeout=TIMEOUT) as job:
        job.wait_for(6)
        os.kill(job.pid(2), signal.SIGSTOP)
        assert job.end(SURVIVORS, TIMEOUT + MERCY) == [1, 1, 1], job.outputs()
        for message in messages(job):
            assert "rank 2 does not answer within 3 s" in message
            assert "gradient exchange of step" in message


@pytest.mark.integration
@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_the_others_hear_what_a_rank_raised(tmp_path, kind):
    own = {2: {"arguments": {"mishap": (7, kind("image 41 is\nbroken"))}}}
    with Job(tmp_path, own=own, steps=1000, timeout=TIMEOUT) as job:
        assert job.end(range(WORLD), 120.0) == [1] * WORLD, job.outputs()
        for message in messages(job):
            words = f"rank 2 raised {kind.__name__}: image 41 is broken (in the forward pass of step 7)"
            assert words in message
        assert "image 41 is" in job.output(2)
        assert "gradient exchange failed" not in job.output(2)


@pytest.mark.integration
def test_a_rank_killed_while_others_wait_in_validation(tmp_path):
    """The survivors wait in Lightning's own metric reduction, not in the exchange."""
    own = {2: {"arguments": {"pause": 0.05}}}
    with Job(tmp_path, own=own, steps=1000, timeout=TIMEOUT, validate=5, pause=0.01) as job:
        job.wait_for(3, "validation")
        os.kill(job.pid(2), signal.SIGKILL)
        assert job.end(SURVIVORS, TIMEOUT + MERCY) == [1, 1, 1], job.outputs()
        for message in messages(job):
            assert "rank 2 is gone" in message
            assert "validation before step 5" in message


@pytest.mark.integration
@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"version": "0.0.1"}, "ranks disagree on `version`"),
        ({"arguments": {"config": {"bits": 8}}}, "ranks disagree on `bits`: rank 0 has 4, rank 2 has 8"),
    ],
)
def test_another_version_or_config_stops_all_before_the_first_step(tmp_path, difference, words):
    with Job(tmp_path, own={2: difference}, timeout=60.0) as job:
        assert job.end(range(WORLD), 120.0) == [1] * WORLD, job.outputs()
        for rank in range(WORLD):
            assert words in job.error(rank)
            assert "rank 2 has" in job.error(rank)
            assert job.progress(rank) == 0
