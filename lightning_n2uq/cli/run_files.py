"""Where a run's files go, and what is written there besides checkpoints and metrics."""

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning_utilities.core.rank_zero import rank_zero_only

from lightning_n2uq.cli.configs import NAME_HEADER

ROOT = "runs"
_WANDB_FOLDER = re.compile(r"(?:offline-)?run-(\d{8}_\d{6})-(.+)")
_SHARED_VARIABLE = "N2UQ_RUN_DIR"


def create_run_dir(root: str, name: str, command: str) -> str:
    """Creates `root/name/<time>`, with `-<command>` behind it for other commands than fit.

    Only rank 0 chooses. Ranks that Lightning starts inherit its choice through the environment; those of
    torchrun and SLURM get another name, which stays unused since writers and checkpoints are rank 0's.
    """
    rank = getattr(rank_zero_only, "rank", 0)  # set by Lightning from the launcher's environment
    if rank and _SHARED_VARIABLE in os.environ:
        return os.environ[_SHARED_VARIABLE]
    stem = time.strftime("%Y%m%d-%H%M%S") + ("" if command == "fit" else f"-{command}")
    for attempt in range(1000):
        path = Path(root, name, f"{stem}-{attempt}" if attempt else stem)
        with contextlib.suppress(FileExistsError):
            if not rank:
                path.mkdir(parents=True)
            break
    os.environ[_SHARED_VARIABLE] = str(path)
    return str(path)


def remove_if_empty(run_dir: str, root: str) -> None:
    """Removes the folder of a run that wrote nothing, for example because of an error in its config."""
    path = Path(run_dir)
    with contextlib.suppress(OSError):  # not empty, or gone
        path.rmdir()
        for parent in path.parents:
            if parent == Path(root) and root != ROOT:  # a folder that the user chose stays
                break
            parent.rmdir()


def finish_wandb(failed: bool) -> None:
    """Closes W&B's run, if there is one: its files are then whole, and a next run in this process is new."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=int(failed))


def summarize_best(trainer: Trainer, checkpoint: Any) -> None:  # noqa: ANN401  # ModelCheckpoint, or none
    """Writes the best score and its epoch's name into W&B's summary, beside the last values."""
    score = getattr(checkpoint, "best_model_score", None)
    if score is None or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if type(logger).__name__ == "WandbLogger":
            cast(Any, logger).experiment.summary.update({f"best/{checkpoint.monitor}": float(score)})


def wandb_id(folder: str) -> str | None:
    """Returns the id of the W&B run whose files lie in `folder`, so that a resumed run goes on in it."""
    found = [_WANDB_FOLDER.fullmatch(path.name) for path in Path(folder, "wandb").glob("*run-*")]
    return max((match[1], match[2]) for match in found if match)[1] if any(found) else None


def place_files(
    config: Namespace, run_dir: str, name: str, wandb: str | None, of_run: str | None = None
) -> None:
    """Points checkpoints and loggers at `run_dir` (where the user set no folder) and chooses W&B's mode.

    Args:
        config: Parsed config of one sub-command; changed in place.
        run_dir: The run's folder.
        name: The run's name, shown by W&B.
        wandb: `online`, `offline`, `disabled`, or None to leave what the config says.
        of_run: The folder of the run that an evaluation belongs to, whose run of W&B it goes into.
    """
    config.trainer.default_root_dir = run_dir
    if config.checkpoint.dirpath is None:
        config.checkpoint.dirpath = run_dir
    loggers = config.trainer.logger
    if not isinstance(loggers, list):
        loggers = [loggers] if isinstance(loggers, Namespace) else []
    kept = []
    here = os.path.abspath(run_dir)
    for logger in loggers:
        arguments = logger.get("init_args", Namespace())  # type: ignore[no-untyped-call]
        if arguments.get("save_dir") in (None, ".", ROOT):
            arguments.save_dir = run_dir
        if logger.class_path.endswith(".WandbLogger"):
            if wandb == "disabled":
                continue
            # W&B's service, which an earlier run may have started elsewhere, writes from its own folder.
            arguments.save_dir = os.path.abspath(arguments.save_dir)
            arguments.offline = arguments.offline if wandb is None else wandb == "offline"
            if arguments.get("id") is None and arguments.get("version") is None:
                arguments.id = wandb_id(of_run or arguments.save_dir) if arguments.save_dir == here else None
            arguments.name = arguments.name or f"{name}/{os.path.basename(of_run or run_dir)}"
        kept.append(logger)
    if loggers:
        config.trainer.logger = kept or False


def config_text(parser: LightningArgumentParser, given: Namespace, name: str, skip: set[str]) -> str:
    """Returns what `config.yaml` of a run holds.

    Args:
        parser: Parser of the sub-command.
        given: Config before the paths of the run were put in; not changed.
        name: The run's name, kept in the first line.
        skip: Keys that belong to one sub-command only.
    """
    given = given.clone()  # type: ignore[no-untyped-call]
    for key in skip:
        given.pop(key, None)
    return f"{NAME_HEADER}{name}\n" + parser.dump(given, skip_none=False, skip_validation=True)


class SaveRunConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder and beside the checkpoints, and tells it to every logger.

    The file holds what every sub-command accepts, and no path of this run, so that `--config config.yaml`
    repeats the training and evaluates the checkpoint as well.

    Args:
        parser: Parser of the sub-command.
        config: Config with the paths of this run (Lightning passes it; not saved).
        text: What `config_text` returned.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, text: str) -> None:
        super().__init__(parser, config, overwrite=True, save_to_log_dir=False)
        self._text = text

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the parser: processes that Lightning spawns get the callback without it."""
        return {**self.__dict__, "parser": None, "config": None}

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes the file; Lightning calls this once, on rank 0."""
        import yaml  # type: ignore[import-untyped]  # Lightning depends on it

        checkpoint = trainer.checkpoint_callback
        for folder in {
            trainer.default_root_dir,
            getattr(checkpoint, "dirpath", None) or trainer.default_root_dir,
        }:
            os.makedirs(folder, exist_ok=True)
            Path(folder, self.config_filename).write_text(self._text, encoding="utf-8")
        for logger in trainer.loggers:
            logger.log_hyperparams({"config": yaml.safe_load(self._text)})
