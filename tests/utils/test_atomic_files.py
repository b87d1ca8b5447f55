import os
import threading

import pytest

from lightning_n2uq.utils.atomic import replacing


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"durable": True}])
def test_a_file_appears_as_a_whole_and_folders_are_made(tmp_path, options):
    path = tmp_path / "new" / "file.txt"
    with replacing(path, **options) as partial:
        partial.write_text("whole")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_writers_of_a_shared_file_do_not_meet(tmp_path):
    path, barrier = tmp_path / "file.txt", threading.Barrier(2)

    def write(text):
        with replacing(path, shared=True) as partial:
            barrier.wait()
            partial.write_text(text)
            barrier.wait()

    threads = [threading.Thread(target=write, args=(text,)) for text in ("one" * 1000, "two" * 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("one" * 1000, "two" * 1000)
    assert os.listdir(tmp_path) == ["file.txt"]
