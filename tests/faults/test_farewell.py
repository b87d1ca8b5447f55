"""What ranks tell each other, without a job: bounded, one line, and read with suspicion."""

import contextlib
import json
import socket
import time

import pytest
import torch.distributed as dist

from lightning_n2uq.distributed.answer import Answer, Notice, plain
from lightning_n2uq.distributed.farewell import report_failure
from lightning_n2uq.distributed.rollcall import RollCall


@pytest.fixture
def pair():
    calls = [RollCall(lambda: Answer(5, "gradient exchange of step 4")) for _ in range(2)]
    yield calls
    for call in calls:
        call.close()


def test_a_notice_arrives_before_tell_returns(pair):
    asked, told = pair
    notice = Notice(2, "raised ValueError: bad", origin=True)
    asked.tell(notice, {0: told.address})
    assert told.notices == {2: notice}
    asked.close()
    assert told.suspects({2: asked.address}) == ["rank 2 raised ValueError: bad"]


def test_ranks_that_only_stopped_are_left_out_where_the_cause_is_known(pair):
    asked, told = pair
    asked.tell(Notice(1, "stopped because rank 2 is gone", origin=False), {0: told.address})
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = f"127.0.0.1|{server.getsockname()[1]}"
    assert told.suspects({1: closed, 2: closed}) == ["rank 2 is gone"]
    assert told.suspects({1: closed}) == ["rank 1 stopped because rank 2 is gone"]


def test_whereabouts_are_bounded(pair):
    asked, told = pair
    text = told.whereabouts(dict.fromkeys(range(20), asked.address))
    assert text.count("gradient exchange of step 4") == 8
    assert text.endswith("; ...")


def test_strangers_are_neither_believed_nor_waited_for_long(pair):
    asked, told = pair
    host, port = told.address.split("|")
    for message in (
        b"\xff\xfe",
        b"[1, 2]",
        json.dumps({"rank": "2", "text": "x", "origin": True}).encode(),
        json.dumps({"rank": 2, "text": "x"}).encode(),
        b"x" * 5000,
    ):
        stranger = socket.create_connection((host, int(port)), timeout=5)
        with stranger, contextlib.suppress(OSError):  # told may have read enough and hung up already
            stranger.sendall(message)
            stranger.shutdown(socket.SHUT_WR)
    assert told.notices == {}
    began = time.monotonic()
    with socket.create_connection((host, int(port)), timeout=5):  # says nothing
        assert asked.whereabouts({0: told.address}) == "rank 0: gradient exchange of step 4"
    assert time.monotonic() - began < 2.5
    asked.tell(Notice(9, "of another job", origin=True), {0: told.address})
    assert told.suspects({1: asked.address}) == []


@pytest.mark.parametrize("text", ["a\nb\t\x1b[31mc", '"\\' * 400, "\u00e9" * 400])
def test_texts_are_one_printable_line_and_messages_fit(text):
    line = plain(text)
    assert len(line) <= 300
    assert line.isprintable()
    assert line.isascii()
    message = Notice(3, text, origin=True).encode()
    assert len(message) <= 1024
    assert Notice.decode(message) == Notice(3, line, origin=True)
    assert Answer.decode(Answer(1, text).encode()) == Answer(1, line)


class Peers:
    doing = "forward pass of step 3"

    def __init__(self, missing=""):
        self.found, self.told = missing, []

    def missing(self, behind=True):
        return self.found

    def whereabouts(self):
        return "rank 1: validation before step 3"

    def tell(self, text, origin):
        self.told.append((text, origin))


def test_an_own_error_is_told_as_the_origin():
    peers = Peers()
    assert report_failure(peers, RuntimeError("shapes differ")) == ""
    assert peers.told == [("raised RuntimeError: shapes differ (in the forward pass of step 3)", True)]


def test_an_own_error_does_not_wait_for_others():
    peers = Peers(missing="rank 1 is gone")
    report_failure(peers, ValueError("bad"))
    assert peers.told == [("raised ValueError: bad (in the forward pass of step 3)", True)]


@pytest.mark.parametrize(
    "error", [dist.DistBackendError("x"), RuntimeError("Timed out waiting 60ms for recv")]
)
def test_a_collective_that_nobody_explains_says_where_all_are(monkeypatch, error):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    peers = Peers()
    cause = report_failure(peers, error)
    assert cause.endswith("all ranks answer (rank 1: validation before step 3)")
    assert not peers.told[0][1]


def test_an_explained_failure_is_not_told_twice():
    peers = Peers(missing="rank 1 is gone")
    assert report_failure(peers, RuntimeError("gradient exchange failed on rank 0: ...")) == ""
    assert peers.told == []
