"""What a test leaves in the environment of ranks does not reach the next one."""

import os


def test_a_launcher_makes_this_process_a_rank():
    os.environ["LOCAL_RANK"] = os.environ["WORLD_SIZE"] = "1"
    assert os.environ["LOCAL_RANK"] == "1"


def test_the_next_test_is_none():
    assert not {"LOCAL_RANK", "WORLD_SIZE"} & os.environ.keys()
