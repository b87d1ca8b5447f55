"""Faults of the network: four hosts in namespaces, cables cut and throttled while they train."""

import time

import pytest
from fault_job import WORLD
from fault_launch import Job, complete
from fault_network import cut, mend, namespaces, network, reason_to_skip, throttle

pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "no reason")
TIMEOUT, MERCY = 6.0, 10.0


@pytest.fixture
def net():
    with network() as made:
        yield made
    assert not namespaces() & {made.hub, *made.hosts}


def messages(job, ranks):
    return [job.error(rank) for rank in ranks]


@pytest.mark.integration
def test_a_cut_link_ends_all_ranks_and_the_job_resumes(tmp_path, net):
    with Job(tmp_path, network=net, steps=1000, timeout=TIMEOUT) as job:
        job.wait_for(12)
        cut(net, 2)
        assert job.end(range(WORLD), TIMEOUT + MERCY) == [1] * WORLD, job.outputs()
        for message in messages(job, [0, 1, 3]):
            assert "rank 2 does not answer within 3 s" in message or "rank 2 cannot be reached" in message
            assert "in the gradient exchange of step" in message
        assert "check this rank's own network" in messages(job, [2])[0]
    mend(net, 2)
    complete(tmp_path, network=net)


@pytest.mark.slow
def test_a_link_cut_for_five_seconds_is_survived(tmp_path, net):
    with Job(tmp_path, network=net, steps=100, timeout=60.0, pause=0.1) as job:
        job.wait_for(12)
        cut(net, 2)
        time.sleep(2.5)
        stuck = job.progress(0)
        time.sleep(2.5)
        assert job.progress(0) == stuck < 100  # the cut was felt
        mend(net, 2)
        assert job.end(range(WORLD), 120.0) == [0] * WORLD, job.outputs()
        assert len({found["total"] for found in job.results()}) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("timeout", "goes_on"), [(60.0, True), (2.0, False)])
def test_a_link_throttled_to_one_mbit(tmp_path, net, timeout, goes_on):
    """About 1.2 MB per step and direction: ten seconds on the slow cable, which only one timeout allows."""
    steps = 14 if goes_on else 1000
    with Job(tmp_path, network=net, steps=steps, timeout=timeout, width=88_000, pause=0.3) as job:
        job.wait_for(12)
        throttle(net, 2, 1)
        if goes_on:
            assert job.end(range(WORLD), 200.0) == [0] * WORLD, job.outputs()
            assert len({found["total"] for found in job.results()}) == 1
            return
        assert job.end(range(WORLD), timeout + MERCY) == [1] * WORLD, job.outputs()
        for message in messages(job, range(WORLD)):
            assert "gradient exchange of step" in message
            assert "Timed out" in message or "timeout" in message or "stopped" in message, message
