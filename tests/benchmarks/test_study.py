"""The study runner: order, starts, stops, pauses, and that a stopped study ends as an uninterrupted one."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from lightning.pytorch import Trainer

from benchmarks.study import pictures, plan, release, results, table
from benchmarks.study.plan import Run, Study
from benchmarks.study.runner import PAUSE_FILE, Runner
from lightning_n2uq.callbacks import SimulatedRanks
from lightning_n2uq.datamodules import DigitsDataModule
from lightning_n2uq.modules import QuantizedClassifier

# Stands in for the command where the runner itself is tested: leaves a run's files, or does as it is told.
FAKE = """
import os, pathlib, signal, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
place = pathlib.Path(options["--trainer.default_root_dir"])
(place / "teacher").write_text(options.get("--model.init_args.teacher", ""))
start = options["--model.init_args.init_from"]
assert start == "null" or pathlib.Path(start).is_file()
print("started", flush=True)
if (place.parent / "fail").exists():
    sys.exit("no such thing")
for _ in range(int((place.parent / "ticks").read_text()) if (place.parent / "ticks").exists() else 0):
    time.sleep(0.05)
    with (place / "ticked").open("a") as file:
        file.write(".")
(place / "last.ckpt").touch()
rows = [f"{epoch},0.5,{0.25 * (epoch + 1)}" for epoch in range(int(options["--trainer.max_epochs"]))]
(place / "metrics.csv").write_text("\\n".join(["epoch,train/loss,val/acc", *rows]) + "\\n")
"""


def run(row: str, seed: int = 0, start: str | None = None, epochs: int = 2) -> Run:
    return Run(row, seed, epochs, (("model.init_args.lr", "0.01"),), "a paper", start)


@pytest.fixture
def study() -> Study:
    return Study("digits", (run("float"), run("n2uq_w2a2", start="float"), run("float", seed=1)))


@pytest.fixture
def runner(study: Study, tmp_path: Path) -> Runner:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    command = (sys.executable, str(script))
    return Runner(study, None, tmp_path / "runs", tmp_path / "results", jobs=2, command=command)


@pytest.mark.integration
def test_all_runs_are_worked_off_and_keep_their_figures(runner: Runner, study: Study) -> None:
    assert runner.work()
    kept = {path.stem for path in (runner.output / "study_digits").glob("*.json")}
    assert kept == {"float_seed0", "n2uq_w2a2_seed0", "float_seed1"}
    figures = results.load(runner.output, study, study.runs[1])
    assert figures["test_acc"] == 0.5
    assert figures["curves"]["val/acc"] == [0.25, 0.5]
    assert figures["settings"] == {"model.init_args.lr": "0.01"}


@pytest.mark.integration
def test_a_setting_may_name_the_checkpoint_that_a_run_starts_from(runner: Runner) -> None:
    teacher = (("model.init_args.teacher", "{start}"),)
    runner.study = Study("digits", (run("float"), Run("n2uq_w2a2", 0, 2, teacher, "a paper", "float")))
    assert runner.work()
    assert (runner.folder / "n2uq_w2a2_seed0" / "teacher").read_text() == str(
        runner.folder / "float_seed0" / "last.ckpt"
    )


def test_a_run_may_start_from_a_row_whose_name_is_no_folder(runner: Runner) -> None:
    first = run("float, ddp")
    runner.study = Study("digits", (replace(first, config="float"), run("n2uq_w2a2", start="float, ddp")))
    assert runner.work()


def test_rows_of_the_ablation_differ_from_their_recipe_in_what_they_say() -> None:
    runs = {one.row: one for one in plan.cifar10_ablation().runs}
    assert len({one.name for one in runs.values()}) == len(runs)
    for row, one in runs.items():
        base = runs[row.split(",")[0]]
        assert (one.config, one.epochs, one.start) == (base.config, base.epochs, base.start)
        assert all(value for _, value in one.settings)
        changed = set(one.settings) ^ set(base.settings)
        assert bool(changed) == ("," in row)
        if "optimizer" not in row:
            assert len({name for name, _ in changed}) <= 2


def test_rows_on_oscillation_are_of_one_network_and_count_or_stop_it() -> None:
    study = plan.cifar10_oscillation()
    assert len({one.identity(study.configs) for one in study.runs}) == len(study.runs) == 18
    backbone = {"model.init_args.backbone", "model.init_args.backbone_args"}
    assert len({tuple(dict(one.settings)[name] for name in sorted(backbone)) for one in study.runs}) == 1
    for one in study.runs:
        settings = dict(one.settings)
        if settings.get("trainer.callbacks+") == "OscillationControl":
            stops = settings["trainer.callbacks.freeze_above"] != "null"
            assert stops == ("frozen" in one.row)
            assert ("trainer.callbacks.dampening" in settings) == ("dampened" in one.row)
        else:
            assert one.row == "float" or "norms" in one.row


def test_the_network_on_oscillation_ends_at_maps_of_two_by_two_pixels() -> None:
    settings = dict(plan.cifar10_oscillation().runs[0].settings)
    assert settings["model.init_args.backbone"] == "torchvision/mobilenet_v2"
    arguments = json.loads(settings["model.init_args.backbone_args"])["model_args"]
    network = torchvision.models.mobilenet_v2(num_classes=10, **arguments)
    assert network.features(torch.zeros(2, 3, 32, 32)).shape == (2, 1280, 2, 2)


def test_the_share_of_oscillating_weights_is_the_last_one_that_was_logged(tmp_path: Path) -> None:
    study = plan.cifar10_oscillation(epochs=2, float_epochs=2)
    place = tmp_path / "run"
    place.mkdir()
    for entry, shares in zip(study.runs[:2], (("", ""), ("0.5", "0.25")), strict=True):
        rows = [f"{epoch},0.5,{share}" for epoch, share in enumerate(shares)]
        (place / "metrics.csv").write_text("\n".join(["epoch,val/acc,oscillation/oscillating", *rows]) + "\n")
        results.save(tmp_path, study, entry, results.collect(entry, study, place, 1.0))
    lines = table.markdown(study, tmp_path).splitlines()
    assert lines[0].endswith("| optimizer | oscillating [%] |")
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["-", "25.00"]


@pytest.mark.integration
def test_finished_runs_are_not_repeated(runner: Runner) -> None:
    runner.work()
    logs = {path: path.read_text() for path in runner.folder.rglob("log.txt")}
    assert runner.work()
    assert {path: path.read_text() for path in runner.folder.rglob("log.txt")} == logs


@pytest.mark.integration
def test_other_settings_are_another_run_and_lose_no_file(runner: Runner, study: Study) -> None:
    runner.work()
    runner.study = Study("digits", (run("float", epochs=3),))
    assert results.load(runner.output, runner.study, runner.study.runs[0]) is None
    assert runner.work()
    assert len(list(runner.folder.glob("float_seed0.other-*/metrics.csv"))) == 1
    assert results.load(runner.output, runner.study, runner.study.runs[0])["epochs"] == 3


def test_a_failed_run_is_named_and_those_that_start_from_it_wait(runner: Runner, capsys) -> None:
    runner.folder.mkdir()
    (runner.folder / "fail").touch()
    assert not runner.work()
    assert runner.failed == ["float_seed0", "float_seed1"]
    assert "float_seed0: failed with exit code 1, see " in capsys.readouterr().out
    assert not (runner.folder / "n2uq_w2a2_seed0").exists()


@pytest.mark.integration
def test_the_pause_file_makes_processes_stand_still(runner: Runner) -> None:
    runner.folder.mkdir()
    (runner.folder / "ticks").write_text("60")
    pause, ticked = runner.folder / PAUSE_FILE, runner.folder / "float_seed0" / "ticked"
    seen: list[int] = []

    def watch() -> None:
        while not ticked.exists():
            time.sleep(0.05)
        pause.touch()
        time.sleep(1.5)
        seen.append(ticked.stat().st_size)
        time.sleep(0.5)
        seen.append(ticked.stat().st_size)
        pause.unlink()

    thread = threading.Thread(target=watch)
    thread.start()
    runner.study = Study("digits", (run("float"),))
    began = time.monotonic()
    assert runner.work()
    taken = time.monotonic() - began
    thread.join()
    assert seen[0] == seen[1] < 60
    assert ticked.stat().st_size == 60
    figures = results.load(runner.output, runner.study, runner.study.runs[0])
    assert figures["seconds"] < taken - 0.9  # the pause of 2 s, noticed within a second, is not counted


def test_two_at_once_are_refused(runner: Runner) -> None:
    with (
        runner._alone(),
        pytest.raises(ValueError, match=r"folder: got '.*runs', where another process works"),
    ):
        Runner(runner.study, None, runner.folder, runner.output).work()


def test_figures_need_every_epoch(runner: Runner, study: Study, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,val/acc\n0,0.5\n")
    with pytest.raises(ValueError, match=r"got 1 epochs in metrics\.csv, expected 2"):
        results.collect(study.runs[0], study, tmp_path, 1.0)


def test_the_plan_of_cifar10_names_shipped_configs_and_sources() -> None:
    study = plan.cifar10()
    assert [entry.name for entry in study.runs[:5]] == [
        "float_seed0",
        "n2uq_w2a2_seed0",
        "lsq_w2a2_seed0",
        "n2uq_w4a4_seed0",
        "lsq_w4a4_seed0",
    ]
    assert len({entry.name for entry in study.runs}) == len(study.runs) == 29
    for entry in study.runs:
        assert entry.identity(study.configs)  # reads the config
        assert entry.source
        assert (entry.start is None) == (entry.row == "float")
    decay = {e.row: dict(e.settings)["model.init_args.weight_decay"] for e in study.runs}
    assert (decay["lsq_w2a2"], decay["lsq_w3a3"], decay["lsq_w4a4"]) == ("2.5e-5", "5e-5", "1e-4")
    for bits in (2, 4):
        mended, lsq = (
            next(e for e in study.runs if e.row == row)
            for row in (f"n2uq_w{bits}a{bits}, ranges from data, LSQ's optimizer", f"lsq_w{bits}a{bits}")
        )
        settings = dict(mended.settings)
        assert settings.pop("trainer.callbacks+") == "RangeInitialization"
        assert (settings, mended.source) == (dict(lsq.settings), lsq.source)
        assert mended.config_in(study.configs).stem == f"n2uq_w{bits}a{bits}"
    learned, fixed = (
        next(
            set(e.settings)
            for e in study.runs
            if e.row == f"n2uq_w2a2, ranges from data, LSQ's optimizer{end}"
        )
        for end in ("", ", fixed thresholds")
    )
    assert fixed - learned == {("model.init_args.activation_quantizer", "n2uq_fixed")}
    assert learned < fixed
    for method in ("n2uq", "lsq"):
        short, longer = (
            next(e for e in study.runs if e.row == row)
            for row in (f"{method}_w2a2", f"{method}_w2a2, 20 epochs")
        )
        assert (short.epochs, longer.epochs) == (10, 20)
        assert (longer.settings, longer.source, longer.start) == (short.settings, short.source, "float")
        assert longer.config_in(study.configs) == short.config_in(study.configs)
    formats = {e.row == "float": dict(e.settings).get("model.init_args.memory_format") for e in study.runs}
    assert formats == {True: None, False: "channels_last"}


def test_the_ranks_of_the_second_study_differ_in_their_strategy_alone() -> None:
    study = plan.cifar10_ranks()
    assert len({entry.name for entry in study.runs}) == len(study.runs) == 14
    assert len({entry.identity(study.configs) for entry in study.runs}) == 14
    left = [{**dict(entry.settings), "trainer.strategy": ""} for entry in study.runs]
    assert all(settings == left[0] for settings in left)
    assert (left[0]["trainer.devices"], left[0]["data.init_args.batch_size"]) == ("4", "32")


def test_rows_of_one_config_have_their_own_names_and_bytes(tmp_path: Path) -> None:
    study = plan.cifar10_ranks(epochs=2)
    place = tmp_path / "run"
    place.mkdir()
    for number, entry in enumerate(study.runs[:2]):
        sent = f"{number}e6" if number else ""
        (place / "metrics.csv").write_text(f"epoch,val/acc,comm/sent_bytes\n0,0.5,{sent}\n1,0.6,\n")
        results.save(tmp_path, study, entry, results.collect(entry, study, place, 1.0))
    lines = table.markdown(study, tmp_path).splitlines()
    assert lines[0].endswith("| against ddp | optimizer | MB per exchange |")
    assert lines[2].startswith("| ddp | 60.00 | - | 60.00 | - | ")
    assert lines[2].endswith(" - |")
    assert lines[3].startswith("| 4 bits | 60.00 | - | 60.00 | +0.00 | ")
    assert lines[3].endswith(" 1.000 |")


def test_rows_with_other_codecs_differ_in_what_they_say() -> None:
    study = plan.cifar10_codecs()
    assert len({entry.identity(study.configs) for entry in study.runs}) == len(study.runs) == 52
    first = {entry.row: dict(entry.settings) for entry in study.runs if entry.seed == 0}
    assert first["float, qsgd_inf, 2 bits"]["trainer.callbacks.settings"] == '{"bits": 2}'
    chosen = ("trainer.callbacks.strategy", "trainer.callbacks.settings")
    for network in ("float", "n2uq_w2a2"):
        rows = [row for name, row in first.items() if name.startswith(network)]
        same = [{name: value for name, value in row.items() if name not in chosen} for row in rows]
        assert len(rows) == 13
        assert all(row == same[0] for row in same)
        assert list(rows[0]).index("trainer.callbacks+") < list(rows[0]).index("trainer.callbacks.ranks")
        for row in rows:  # allowed
            settings = json.loads(row.get("trainer.callbacks.settings", "{}"))
            SimulatedRanks(int(row["trainer.callbacks.ranks"]), row["trainer.callbacks.strategy"], settings)
    starts = {entry.row.split(",")[0]: entry.start for entry in study.runs}
    assert starts == {"float": None, "n2uq_w2a2": "float, ddp"}


@pytest.mark.integration
def test_the_table_has_means_and_errors(runner: Runner, study: Study, tmp_path: Path) -> None:
    runner.work()
    path = results.path_of(runner.output, study, study.runs[2])
    figures = json.loads(path.read_text())
    path.write_text(json.dumps(figures | {"test_acc": 0.6}))
    lines = table.markdown(study, runner.output).splitlines()
    assert lines[2] == "| `digits/float` | 55.00 | 5.00 | 50.00, 60.00 | - | a paper |"
    assert lines[3] == "| `digits/n2uq_w2a2` | 50.00 | - | 50.00 | -5.00 | a paper |"
    curves, *others = pictures.draw_all(study, runner.output, tmp_path)
    assert not others
    assert curves.read_text().count("n2uq_w2a2") >= 1


def _real(folder: Path) -> list[str]:
    """A Python program that works off two real runs."""
    output = str(folder / "out")
    program = (
        "from pathlib import Path; from benchmarks.study.plan import Run, Study;"
        "from benchmarks.study.runner import Runner;"
        "runs = (Run('float', 0, 6, (), 'x'), Run('n2uq_w2a2', 0, 4, (), 'x', 'float'));"
        f"done = Runner(Study('digits', runs), None, Path({str(folder)!r}), Path({output!r})).work();"
        "raise SystemExit(not done)"
    )
    return [sys.executable, "-c", program]


@pytest.mark.integration
def test_a_release_has_weights_that_reach_the_figures_and_no_path(tmp_path: Path) -> None:
    runs = (plan.Run("float", 0, 1, (), "x"), plan.Run("n2uq_w2a2", 0, 1, (), "x", "float"))
    study, folder, output = Study("digits", runs), tmp_path / "runs", tmp_path / "out"
    assert release.release(study, folder, output, tmp_path / "none") == []
    assert Runner(study, None, folder, output).work()
    made = release.release(study, folder, output, tmp_path / "networks")
    assert [path.name for path in made] == ["float_seed0", "n2uq_w2a2_seed0"]
    for path in made:
        checkpoint = torch.load(path / "weights.ckpt", weights_only=True)
        assert "optimizer_states" not in checkpoint
        files = [path / "weights.ckpt", path / "config.yaml", path / "figures.json"]
        assert sorted(path.iterdir()) == sorted(files)
        assert all(str(tmp_path).encode() not in file.read_bytes() for file in files)
        module = QuantizedClassifier.load_from_checkpoint(path / "weights.ckpt")
        data = DigitsDataModule(num_workers=0, seed=0)
        options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
        found = Trainer(default_root_dir=tmp_path, **options).validate(module, data, verbose=False)[0]
        figures = json.loads((path / "figures.json").read_text())
        assert found["val/acc"] == pytest.approx(figures["test_acc"], abs=1e-6)
    sums = dict(
        reversed(line.split("  ")) for line in (tmp_path / "networks/SHA256SUMS").read_text().splitlines()
    )
    assert sums.keys() == {f"{path.name}/{file.name}" for path in made for file in path.iterdir()}
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "networks" / name).read_bytes()).hexdigest() == digest
    assert "| `digits/n2uq_w2a2` | " in (tmp_path / "networks/README.md").read_text()


@pytest.mark.slow
def test_a_study_that_is_stopped_three_times_has_the_figures_of_an_uninterrupted_one(tmp_path: Path) -> None:
    root = {"cwd": plan.ROOT, "timeout": 600}
    subprocess.run(_real(tmp_path / "whole"), check=True, **root)
    stops = 0
    while stops < 3:
        process = subprocess.Popen(_real(tmp_path / "stopped"), cwd=plan.ROOT)
        time.sleep(14 + 3 * stops)
        os.kill(process.pid, signal.SIGTERM)
        process.wait(timeout=120)
        stops += 1
    subprocess.run(_real(tmp_path / "stopped"), check=True, **root)
    for name in ("float_seed0", "n2uq_w2a2_seed0"):
        whole, stopped = (
            json.loads((tmp_path / kind / "out" / "study_digits" / f"{name}.json").read_text())
            for kind in ("whole", "stopped")
        )
        for curve in ("val/loss", "val/acc"):  # the training averages of a stopped epoch begin anew
            assert whole["curves"][curve] == stopped["curves"][curve]
