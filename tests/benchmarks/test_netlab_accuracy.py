import pytest

from benchmarks.netlab import accuracy


def run(config, method, seconds, accuracies):
    curve = [[seconds * epoch, value] for epoch, value in enumerate(accuracies, 1)]
    return {"config": config, "method": method, "seed": 0, "curve": curve, "megabytes": 3.0, "steps": 20}


def test_seconds_of_a_short_run_replace_those_of_a_long_one():
    long, short = run("float", "ddp", 9.0, [50.0, 90.0, 95.0]), run("float", "ddp", 0.0, [1.0, 2.0, 3.0])
    short["curve"] = [[5.0, 1.0], [7.0, 2.0], [9.0, 3.0]]  # the first epoch took longer
    (found,) = accuracy.retime([long], [short])
    assert found["curve"] == [[2.0, 50.0], [4.0, 90.0], [6.0, 95.0]]
    assert long["curve"][0] == [9.0, 50.0]
    assert "| float | ddp | 95.00 | 95.00 | 6.0 | 3.0 |" in accuracy.render([found])


def test_a_method_without_speed_is_named():
    with pytest.raises(ValueError, match=r"speeds: got no run of \[\('float', 'nuqsgd'\)\]"):
        accuracy.retime([run("float", "nuqsgd", 1.0, [1.0])], [run("float", "ddp", 1.0, [1.0, 2.0])])


def test_bytes_are_per_step_and_accuracies_the_last_of_each_seed(tmp_path):
    first, second = run("float", "ddp", 1.0, [50.0, 90.0]), run("float", "ddp", 1.0, [50.0, 92.0])
    second["megabytes"] = 5.0
    other, elsewhere = run("float", "nuqsgd", 1.0, [91.0]), run("n2uq_w2a2", "ddp", 1.0, [80.0])
    runs = [first, second, other, elsewhere]
    found = accuracy.points(runs, "float")
    assert found == {"ddp": (pytest.approx(0.2), [90.0, 92.0]), "nuqsgd": (pytest.approx(0.15), [91.0])}
    accuracy.draw_bytes(runs, tmp_path / "a.svg")
    accuracy.draw_bytes(runs, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_text().count("<!-- nuqsgd -->") == 1
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_the_drawing_has_a_line_per_method(tmp_path):
    runs = [run("float", "ddp", 1.0, [50.0, 90.0]), run("float", "nuqsgd", 0.5, [40.0, 91.0])]
    accuracy.draw(runs, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
