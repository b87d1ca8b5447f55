import pytest

import runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    runs.write_config(folder)
    done = runs.fit(folder)
    assert done.returncode == 0, done.stderr
    return runs.run_folders(folder)[0]


def check_rows(whole, resumed, marks):
    """Equal rows in equal order, but for averages of interrupted epochs and a row that says of which batches.

    Args:
        whole: Folder of the uninterrupted run.
        resumed: Folder of the other run.
        marks: Epochs that were interrupted, and after how many batches.
    """
    found = [row for row in runs.rows(resumed) if "resume/batch" in row]
    assert {(row["epoch"], row["resume/batch"]) for row in found} == marks
    left, right = ([row for row in runs.rows(at) if row not in found] for at in (whole, resumed))
    assert len(left) == len(right)
    epochs = {epoch for epoch, _ in marks}
    for one, other in zip(left, right, strict=True):
        if "train/acc" in one and one["epoch"] in epochs:
            assert 0 <= float(other.pop("train/acc")) <= 1
            one.pop("train/acc")
        assert one == other


@pytest.mark.integration
def test_runs_interrupted_by_every_signal_end_like_an_uninterrupted_one(whole, tmp_path):
    """Mid-epoch, before a validation, at an epoch's first step; SIGKILL goes back to the last epoch."""
    runs.write_config(tmp_path)
    interruptions = [("3 SIGTERM", 143), ("5 SIGINT", 130), ("6 SIGUSR1", 138), ("13 SIGKILL", -9)]
    for stop_at, code in interruptions:
        done = runs.fit(tmp_path, "--resume", "auto", stop_at=stop_at)
        assert done.returncode == code, done.stderr
        if code > 0:
            step, name = stop_at.split()
            assert f"stopped by {name} after step {step}, saved in " in done.stderr
            assert "go on with: n2uq fit --config tiny.yaml --resume auto" in done.stderr
            assert "Traceback" not in done.stderr
    done = runs.fit(tmp_path, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    (folder,) = runs.run_folders(tmp_path)
    assert runs.differing(runs.state(whole), runs.state(folder)) == []
    check_rows(whole, folder, {("0", "3"), ("1", "1")})
    assert runs.snapshots(whole) == runs.snapshots(folder)
    assert not list(folder.glob("*.partial"))
    assert not (folder / "interrupted.ckpt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 7, 10, 14, 15])
def test_a_run_stopped_at_any_step_ends_like_an_uninterrupted_one(whole, tmp_path, step):
    runs.write_config(tmp_path)
    assert runs.fit(tmp_path, stop_at=f"{step} SIGTERM").returncode == 143
    assert runs.fit(tmp_path, "--resume", "auto").returncode == 0
    (folder,) = runs.run_folders(tmp_path)
    assert runs.differing(runs.state(whole), runs.state(folder)) == []
    check_rows(whole, folder, {(str(step // 5), str(step % 5))} if step % 5 else set())


@pytest.mark.slow
def test_two_ranks_with_compression_and_error_feedback(tmp_path):
    """One rank alone gets the signal; both save their own residuals."""
    folders = [tmp_path / name for name in ("whole", "stopped")]
    for folder in folders:
        folder.mkdir()
        runs.write_config(folder, **runs.TWO_RANKS)
    assert runs.fit(folders[0]).returncode == 0
    # after one step DDP has yet to lay out its buckets anew
    for stop_at, code in (("1 SIGTERM 0", 143), ("7 SIGTERM 1", 143), ("11 SIGUSR1 0", 138)):
        done = runs.fit(folders[1], "--resume", "auto", stop_at=stop_at)
        assert done.returncode == code, done.stderr
    done = runs.fit(folders[1], "--resume", "auto")
    assert done.returncode == 0, done.stderr
    (whole,), (stopped,) = (runs.run_folders(folder) for folder in folders)
    state = runs.state(whole)
    assert state["nuqsgd"]["first_leg"].shape[0] == 2
    assert state["nuqsgd"]["first_leg"].any()
    assert state["nuqsgd"]["second_leg"].any()
    assert runs.differing(state, runs.state(stopped)) == []
    check_rows(whole, stopped, {("0", "1"), ("1", "2"), ("2", "1")})


@pytest.mark.slow
def test_another_world_size_is_resumed_with_a_warning(tmp_path):
    runs.write_config(tmp_path, **runs.TWO_RANKS)
    assert runs.fit(tmp_path, stop_at="3 SIGTERM").returncode == 143
    done = runs.fit(tmp_path, "--resume", "auto", "--trainer.devices", "1")
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is of 2 processes, this run has 1" in done.stderr


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_a_complete_run_stays_as_it_is(tmp_path):
    runs.write_config(tmp_path)
    done = runs.fit(tmp_path, "--resume", "auto", stop_at="7 SIGTERM")
    assert "no checkpoint in runs/tiny, starting afresh" in done.stderr
    (folder,) = runs.run_folders(tmp_path)
    path = folder / "interrupted.ckpt"
    path.write_bytes(path.read_bytes()[:-1000])
    done = runs.fit(tmp_path, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert "interrupted.ckpt' is damaged, cut short, or no checkpoint" in done.stderr
    before = runs.state(folder), runs.rows(folder)
    assert runs.fit(tmp_path, "--resume", "auto").returncode == 0
    assert runs.run_folders(tmp_path) == [folder]
    assert runs.differing(before[0], runs.state(folder)) == []
    assert runs.rows(folder) == before[1]


@pytest.mark.integration
def test_a_finished_run_that_validated_within_epochs_stays_as_it_is(tmp_path):
    runs.write_config(tmp_path, val_check_interval=2, limit_train_batches=4, max_epochs=1)
    assert runs.fit(tmp_path).returncode == 0
    (folder,) = runs.run_folders(tmp_path)
    before, rows = (folder / "last.ckpt").read_bytes(), runs.rows(folder)
    assert runs.fit(tmp_path, "--resume", "auto").returncode == 0
    assert runs.run_folders(tmp_path) == [folder]
    assert (folder / "last.ckpt").read_bytes() == before
    assert runs.rows(folder) == rows


@pytest.mark.integration
@pytest.mark.parametrize("interval", [1.0, 2], ids=["at the end of the epoch", "within it"])
def test_a_run_killed_in_a_validation_repeats_it_though_every_step_is_saved(tmp_path, interval):
    arguments = ("--checkpoint.every_n_train_steps", "1", "--checkpoint.monitor", "null")
    folders = {}
    for name, hook in (("killed", "on_validation_start SIGKILL"), ("whole", None)):
        place = tmp_path / name
        place.mkdir()
        runs.write_config(place, num_sanity_val_steps=0, max_epochs=2, val_check_interval=interval)
        if hook:
            assert runs.command("fit", place, *arguments, STOP_IN=hook).returncode == -9
        done = runs.fit(place, *arguments, "--resume", "auto")
        assert done.returncode == 0, done.stderr
        again = runs.fit(place, *arguments, "--resume", "auto")
        assert again.returncode == 0, again.stderr
        (folders[name],) = runs.run_folders(place)
    assert runs.differing(runs.state(folders["killed"]), runs.state(folders["whole"])) == []
    rows = [
        [row for row in runs.rows(folder) if "resume/batch" not in row and "train/acc" not in row]
        for folder in folders.values()
    ]
    assert rows[0] == rows[1]
    assert sum("val/acc" in row for row in rows[1]) == (2 if interval == 1.0 else 4)
