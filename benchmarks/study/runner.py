"""Works off a study: one `n2uq fit --resume auto` per core, stopped and continued at any time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from benchmarks.study import results
from benchmarks.study.plan import Run, Study, run_name

PAUSE_FILE = "PAUSE"
_POLL_SECONDS = 1.0
_SECONDS_TO_SAVE = 120.0  # for a run to end its step and save its state


@dataclass
class Job:
    """A run's process.

    Attributes:
        run: The run.
        process: `n2uq fit`, leader of its own process group.
        before: Seconds that earlier processes of the run took.
        began: When this one was started, on the monotonic clock.
        stopped: Seconds during which it was paused.
    """

    run: Run
    process: subprocess.Popen[bytes]
    before: float
    began: float
    stopped: float = 0.0

    @property
    def seconds(self) -> float:
        """Time of all the run's processes without pauses."""
        return self.before + time.monotonic() - self.began - self.stopped

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Wait until the process has saved its state; kill it if that takes too long."""
        try:
            self.process.wait(_SECONDS_TO_SAVE)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.process.wait()


class Runner:
    """Runs what a study lacks.

    Args:
        study: The runs.
        data: Folder or .zip of the images; None where the data module needs none.
        folder: Where runs leave checkpoints and logs; a run that was stopped goes on from there.
        output: Folder of the JSON files of finished runs.
        jobs: Processes at the same time, one thread each.
        command: The `n2uq` command.
        extra: Options for every run, for trials; they are no part of a run's identity.

    Raises:
        ValueError: Another process works in `folder`, or a folder there is of a run with other settings.
    """

    def __init__(
        self,
        study: Study,
        data: str | None,
        folder: Path,
        output: Path,
        jobs: int = 1,
        command: tuple[str, ...] = (str(Path(sys.executable).with_name("n2uq")),),
        extra: tuple[str, ...] = (),
    ) -> None:
        self.study, self.data, self.folder, self.output = study, data, folder, output
        self.jobs, self.command, self.extra = jobs, command, extra
        self.failed: list[str] = []
        self._asked_to_stop = False

    def work(self) -> bool:
        """Work until nothing is left that can run; returns whether every run has its figures.

        SIGTERM and SIGINT are passed on: the runs save their state, and the next call goes on from there.
        """
        with self._alone(), self._signals():
            running: list[Job] = []
            while True:
                running = [job for job in running if not self._finish(job)]
                while not self._asked_to_stop and len(running) < self.jobs:
                    run = self._next({job.run for job in running})
                    if run is None:
                        break
                    running.append(self._start(run))
                if not running:
                    break
                self._wait(running)
        return not self._missing()

    def _missing(self) -> list[Run]:
        return [run for run in self.study.runs if results.load(self.output, self.study, run) is None]

    def _next(self, busy: set[Run]) -> Run | None:
        """The first run that lacks figures, is not running, has not failed and has where to start from."""
        missing = self._missing()
        waiting = {(run.row, run.seed) for run in missing}
        for run in missing:
            if run in busy or run.name in self.failed or (run.start, run.seed) in waiting:
                continue
            return run
        return None

    def _start(self, run: Run) -> Job:
        place = self.folder / run.name
        self._claim(run, place)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        with (place / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                self._arguments(run, place),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        print(f"{run.name}: started", flush=True)
        return Job(run, process, self._seconds_before(place), time.monotonic())

    def _claim(self, run: Run, place: Path) -> None:
        """Keep the run's identity in its folder, and move the files of other settings aside."""
        mark, identity = place / "identity", run.identity(self.study.configs)
        if place.exists() and (not mark.exists() or mark.read_text() != identity):
            aside = place.with_name(f"{place.name}.other-{int(time.time())}")
            shutil.move(place, aside)
            print(f"{run.name}: its folder was of other settings and is now {aside.name}", flush=True)
        place.mkdir(parents=True, exist_ok=True)
        mark.write_text(identity)

    def _arguments(self, run: Run, place: Path) -> list[str]:
        options = {
            "config": str(run.config_in(self.study.configs)),
            "seed_everything": str(run.seed),
            "data.init_args.seed": str(run.seed),
            "trainer.max_epochs": str(run.epochs),
            "trainer.default_root_dir": str(place),
            "trainer.enable_progress_bar": "false",
            "trainer.enable_model_summary": "false",
            "checkpoint.dirpath": "null",  # in the run's folder, where `--resume auto` finds them
            "wandb": "disabled",
            "resume": "auto",
            **dict(self.study.data_options),
            **dict(run.settings),
        }
        if self.data is not None:
            options["data.init_args.root"] = self.data
        start = options["model.init_args.init_from"] = self._start_of(run)
        options = {name: value.replace("{start}", start) for name, value in options.items()}
        flags = [text for name, value in options.items() for text in (f"--{name}", value)]
        return [*self.command, "fit", *flags, *self.extra]

    def _start_of(self, run: Run) -> str:
        """The last checkpoint of the run that `run` starts from, or `null`."""
        if run.start is None:
            return "null"
        return str(results.last_checkpoint(self.folder / run_name(run.start, run.seed)))

    def _wait(self, running: list[Job]) -> None:
        """Sleep a little, or as long as the pause file is there; pass a stop on."""
        if self._asked_to_stop:
            for job in running:
                job.send(signal.SIGTERM)
            for job in running:
                job.end()
            return
        pause, began = self.folder / PAUSE_FILE, time.monotonic()
        if pause.exists():
            for job in running:
                job.send(signal.SIGSTOP)
            print("paused", flush=True)
            while pause.exists() and not self._asked_to_stop:
                time.sleep(_POLL_SECONDS)
            for job in running:
                job.send(signal.SIGCONT)
                job.stopped += time.monotonic() - began
            print("going on", flush=True)
        time.sleep(_POLL_SECONDS)

    def _finish(self, job: Job) -> bool:
        """Keep what a process that has ended leaves behind; returns whether it has ended."""
        code = job.process.poll()
        if code is None:
            return False
        place = self.folder / job.run.name
        (place / "seconds").write_text(f"{job.seconds:.1f}")
        if code == 0:
            self._keep(job, place)
        elif self._asked_to_stop:
            print(f"{job.run.name}: stopped, goes on at the next start", flush=True)
        else:
            self.failed.append(job.run.name)
            print(f"{job.run.name}: failed with exit code {code}, see {place / 'log.txt'}", flush=True)
        return True

    def _keep(self, job: Job, place: Path) -> None:
        try:
            figures = results.collect(job.run, self.study, place, job.seconds)
        except ValueError as error:
            self.failed.append(job.run.name)
            print(f"{job.run.name}: {error}", flush=True)
            return
        results.save(self.output, self.study, job.run, figures)
        print(f"{job.run.name}: {100 * figures['test_acc']:.2f} % in {job.seconds:.0f} s", flush=True)

    @staticmethod
    def _seconds_before(place: Path) -> float:
        path = place / "seconds"
        return float(path.read_text()) if path.exists() else 0.0

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"folder: got {str(self.folder)!r}, where another process works") from None
            yield

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._asked_to_stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
