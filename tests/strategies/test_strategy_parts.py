"""Parts of the strategies that need no ranks."""

from types import SimpleNamespace

import pytest

from lightning_n2uq.strategies.local import _was_last


@pytest.mark.parametrize(
    ("state", "last"),
    [
        ({"max_steps": 10, "global_step": 9}, False),
        ({"max_steps": 10, "global_step": 10}, True),
        ({"max_steps": -1, "global_step": 10}, False),
        ({"max_steps": None, "global_step": 10}, False),
        ({"max_epochs": 3, "current_epoch": 2, "is_last_batch": True}, True),
        ({"max_epochs": 3, "current_epoch": 2, "is_last_batch": False}, False),
        ({"max_epochs": 3, "current_epoch": 1, "is_last_batch": True}, False),
        ({"max_epochs": -1, "current_epoch": 7, "is_last_batch": True}, False),
        ({"max_epochs": None, "current_epoch": 7, "is_last_batch": True}, False),
        ({"max_epochs": 3, "current_epoch": 0, "max_steps": 5, "global_step": 5}, True),
    ],
)
def test_the_last_batch_is_known_by_steps_and_by_epochs(state: dict[str, object], last: bool) -> None:
    running = {
        "max_steps": -1,
        "global_step": 0,
        "max_epochs": -1,
        "current_epoch": 0,
        "is_last_batch": False,
    }
    assert _was_last(SimpleNamespace(**(running | state))) is last
