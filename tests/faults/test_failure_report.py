"""What ranks tell each other through the store, without a job: named causes, one line each, within a time."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch.distributed as dist

from lightning_n2uq.distributed import failure_report
from lightning_n2uq.distributed.failure_report import FailureReport, plain

BROKE = RuntimeError("Read error: Connection reset by peer")
TIMED_OUT = RuntimeError("Timed out waiting 2000ms for recv operation to complete")


@pytest.fixture
def ranks(monkeypatch):
    """Three ranks of one process, which meet at a store."""
    monkeypatch.setattr(failure_report, "_GRACE_S", 1.0)
    store = dist.HashStore()
    made = [FailureReport("exchange", range(3), rank, store) for rank in range(3)]
    yield made
    for report in made:
        report.close()


def test_a_cause_is_known_to_all_before_tell_returns(ranks):
    ranks[2].status = "forward pass of step 7"
    ranks[2].report(ValueError("image 41 is\nbroken"))
    ranks[2].close()
    cause = "rank 2 raised ValueError: image 41 is broken (in the forward pass of step 7)"
    assert ranks[0].suspects(BROKE) == cause
    assert ranks[1].report(BROKE) == f"in the start of rank 1: {cause}"
    assert ranks[0].suspects() == cause  # rank 1 only stopped because of rank 2


@pytest.mark.parametrize(("error", "fate"), [(BROKE, "is gone"), (TIMED_OUT, "does not answer within 1 s")])
def test_a_rank_without_a_sign_of_life_is_named(ranks, error, fate):
    ranks[2].close()
    began = time.monotonic()
    assert ranks[0].suspects(error) == f"rank 2 {fate}"
    assert time.monotonic() - began < 3.0


def test_a_status_of_old_is_no_sign_of_life(ranks):
    assert ranks[0].suspects(behind=False) == ""  # all write their status now
    ranks[2].close()
    assert ranks[1].suspects(BROKE) == "rank 2 is gone"
    late = FailureReport("exchange", range(3), 0, ranks[0]._store.underlying_store)
    try:
        assert late.suspects(BROKE) == "rank 2 is gone"  # though its last status is still there
    finally:
        late.close()


def test_a_timeout_of_one_rank_says_that_the_silent_one_hangs(ranks):
    """The rank whose wait timed out closes its connections, so that others see them break."""
    ranks[2].close()
    found = []
    first = threading.Thread(target=lambda: found.append(ranks[0].suspects(TIMED_OUT)))
    first.start()
    time.sleep(0.1)
    assert ranks[1].suspects(BROKE) == "rank 2 does not answer within 1 s"
    first.join()
    assert found == ["rank 2 does not answer within 1 s"]


def test_a_late_timeout_of_one_rank_does_not_hide_that_the_silent_one_broke_off(ranks):
    ranks[2].close()
    assert ranks[1].suspects(BROKE) == "rank 2 is gone"
    assert ranks[0].suspects(TIMED_OUT) == "rank 2 is gone"  # it was waiting for rank 1


def test_a_rank_behind_says_what_it_does(ranks):
    ranks[0].handed_over, ranks[1].handed_over, ranks[2].handed_over = 5, 3, 5
    ranks[1].status = "forward pass of step 7"
    assert ranks[0].suspects(TIMED_OUT) == "rank 1 is 2 messages behind: forward pass of step 7"
    assert ranks[0].suspects(TIMED_OUT, behind=False) == ""


def test_nobody_answers(ranks):
    ranks[1].close()
    ranks[2].close()
    assert ranks[0].suspects(TIMED_OUT).endswith("no other rank can be asked: check this rank's own network")


def test_a_rank_whose_connection_broke_listens_for_the_one_that_closed_it(ranks):
    began = time.monotonic()
    assert ranks[0].suspects(TIMED_OUT) == ""
    assert time.monotonic() - began < 1.0  # nobody closed a connection: nobody is about to speak
    words = "stopped in the gradient exchange of step 2 because of a timeout"
    late = threading.Timer(0.5, ranks[1].tell, (words,), {"origin": False})
    late.start()
    assert ranks[0].suspects(BROKE) == f"rank 1 {words}"
    late.join()


def test_an_exchange_that_nobody_explains_says_where_all_are(ranks):
    ranks[1].status = "validation before step 3"
    ranks[0].status = "gradient exchange of step 2"
    error = ranks[0].explain(TIMED_OUT)
    assert str(error).startswith("gradient exchange failed on rank 0 in the gradient exchange of step 2: ")
    assert "all ranks answer (rank 1: validation before step 3; rank 2: start)" in str(error)
    assert "Timed out waiting" in str(error)
    assert ranks[0].report(error) == ""  # explained and told already
    assert "because all ranks answer" in ranks[1].suspects(BROKE)


@pytest.mark.parametrize("error", [dist.DistBackendError("x"), TIMED_OUT])
def test_another_collective_that_nobody_explains_says_where_all_are(ranks, error):
    cause = ranks[0].report(error)
    assert cause == "in the start of rank 0: all ranks answer (rank 1: start; rank 2: start)"
    assert ranks[0]._notice
    assert not ranks[0]._origin


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("bad")])
def test_an_own_error_is_told_as_the_origin(ranks, error):
    assert ranks[1].report(error) == ""
    assert ranks[0].suspects() == f"rank 1 raised {type(error).__name__}: {error} (in the start)"


def test_whereabouts_are_bounded():
    store = dist.HashStore()
    made = [FailureReport("many", range(10), rank, store) for rank in range(10)]
    assert made[0].suspects() == ""
    text = made[0].whereabouts()
    for report in made:
        report.close()
    assert text.count("start") == 8
    assert text.endswith("; ...")


@pytest.mark.parametrize("text", ["a\nb\t\x1b[31mc", '"\\' * 400, "\u00e9" * 400])
def test_texts_are_one_printable_line(text):
    line = plain(text)
    assert len(line) <= 300
    assert line.isprintable()
    assert line.isascii()


HOST = """
import sys, time
import torch.distributed as dist
from lightning_n2uq.distributed.failure_report import FailureReport
store = dist.TCPStore("127.0.0.1", 0, is_master=True)
report = FailureReport("exchange", range(3), 0, store)
print(store.port, flush=True)
time.sleep(60)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("sign", "error", "words"),
    [
        (signal.SIGKILL, BROKE, "rank 0 is gone (it had the job's store)"),
        (
            signal.SIGSTOP,
            TIMED_OUT,
            "rank 0 does not answer within 3 s (it has the job's store); "
            "no other rank can be asked: check this rank's own network",
        ),
    ],
)
def test_the_rank_that_hosts_the_store_is_named(sign, error, words):
    host = subprocess.Popen([sys.executable, "-c", HOST], stdout=subprocess.PIPE, text=True)
    try:
        store = dist.TCPStore("127.0.0.1", int(host.stdout.readline()), is_master=False)
        report = FailureReport("exchange", range(3), 1, store)
        os.kill(host.pid, sign)
        began = time.monotonic()
        assert report.suspects(error) == words
        report.tell("stopped", origin=False)  # nobody listens
        report.close()
        assert time.monotonic() - began < 10.0
    finally:
        host.kill()
        host.wait()
        host.stdout.close()
