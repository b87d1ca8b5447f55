"""The Trainer's sub-commands: a LightningCLI with this package's classes, defaults and run folders."""

import argparse
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    LearningRateMonitor,
    ProgressBar,
    RichProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

# Imported for their names: short class names and strategy names are known once their module is.
import lightning_n2uq.callbacks
import lightning_n2uq.datamodules
import lightning_n2uq.modules
import lightning_n2uq.strategies  # noqa: F401
from lightning_n2uq.callbacks import NonFiniteError, NonFiniteGuard
from lightning_n2uq.checkpointing import (
    AtomicCheckpointIO,
    BestAndLastModelCheckpoint,
    CheckpointWriteError,
    ExactResume,
    metrics_file,
)
from lightning_n2uq.cli import resuming, run_files
from lightning_n2uq.cli.configs import check_config, resolve_arguments, run_name
from lightning_n2uq.cli.errors import is_out_of_memory, is_user_error
from lightning_n2uq.cli.quiet import quiet_lightning

WANDB_VARIABLE = "WANDB_MODE"
LINKED = ("num_classes", "in_channels", "image_size")
_SPECIAL_CHECKPOINTS = ("best", "last", "hpc")

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": run_files.ROOT,
    "logger": [
        {"class_path": "WandbLogger", "init_args": {"project": "lightning_n2uq", "offline": True}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": run_files.ROOT, "name": "", "version": ""}},
    ],
}
CALLBACK_DEFAULTS: dict[str, Any] = {
    "checkpoint.monitor": "val/acc",
    "checkpoint.mode": "max",
    "checkpoint.filename": "best",
    "checkpoint.save_last": True,
    "checkpoint.auto_insert_metric_name": False,
    "lr_monitor.logging_interval": "epoch",
}


class TrainingFailedError(RuntimeError):
    """An error after training had begun: not a mistake in the config, so it keeps its traceback."""


def run_training_command(command: str, arguments: list[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with its arguments; returns the exit code."""
    quiet_lightning()
    arguments, paths = resolve_arguments(_config_beside_checkpoint(arguments))
    for path in paths:
        check_config(path)
    N2UQCLI(command, arguments, paths)
    return 0


def _config_beside_checkpoint(arguments: list[str]) -> list[str]:
    """Without config and model, use the config that was saved beside the checkpoint."""
    text = " ".join(arguments)
    if any(flag in text for flag in ("--config", "-c ", "--model", "--ckpt_path best")):
        return arguments
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        saved = Path(value if equals else " ".join(arguments[index + 1 : index + 2])).parent / "config.yaml"
        if flag == "--ckpt_path" and saved.is_file():
            return ["--config", str(saved), *arguments]
    return arguments


def _write_error(error: BaseException | None) -> CheckpointWriteError | None:
    """The failed checkpoint behind an error: loggers on the same full disk fail while it is handled."""
    while error is not None and not isinstance(error, CheckpointWriteError):
        error = error.__cause__ or error.__context__
    return error


def _impossible(what: str, error: Exception) -> ValueError:
    """For an error before the first batch, which only the given values can have caused."""
    reason = " ".join(str(error).split())
    return ValueError(
        f"config: nothing can be built from {what} ({type(error).__name__}: {reason}); --debug shows where"
    )


def _has_run_batches(trainer: Trainer) -> bool:
    epoch = trainer.fit_loop.epoch_loop
    loops: Any = (epoch, epoch.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop)
    return any(loop.batch_progress.total.ready for loop in loops)


def _from_data(name: str) -> Callable[[LightningDataModule], Any]:
    def read(data: LightningDataModule) -> Any:  # noqa: ANN401
        if not hasattr(data, name):
            raise ValueError(
                f"data: {type(data).__name__} has no attribute {name!r}, which the model is built with"
            )
        return getattr(data, name)

    return read


class N2UQCLI(LightningCLI):
    """LightningCLI for one sub-command (parsers of the others would only cost time).

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        arguments: Command-line arguments after the sub-command, configs given by path.
        config_paths: The configs among the arguments; they name the run.
    """

    def __init__(self, command: str, arguments: list[str], config_paths: list[str]) -> None:
        self.command, self.arguments = command, arguments
        self.config_paths = config_paths
        self.name = run_name(config_paths)
        self.root = self.run_dir = ""
        self.resumes = False
        parser_options = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=run_files.SaveRunConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_kwargs={"prog": "n2uq", **parser_options, command: parser_options},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=[command, *arguments],
            auto_configure_optimizers=False,
            # Plain hyperparameters in the checkpoint: they load without the command line's parser.
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in the parent
        """Only the sub-command that was asked for."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, the links from data to model, and our own options."""
        parser.add_lightning_class_args(BestAndLastModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.add_lightning_class_args(RichProgressBar, "progress_bar")
        parser.add_lightning_class_args(NonFiniteGuard, "guard")
        parser.set_defaults(CALLBACK_DEFAULTS)
        for name in LINKED:
            parser.link_arguments(
                "data", f"model.init_args.{name}", compute_fn=_from_data(name), apply_on="instantiate"
            )
        parser.add_argument(
            "--non_finite_guard", type=bool, default=True, help="watch for NaN and collapse (see --guard.*)"
        )
        parser.add_argument(
            "--wandb",
            type=Literal["online", "offline", "disabled"] | None,
            default=None,
            help=f"Weights & Biases mode (default: ${WANDB_VARIABLE}, else what the config says)",
        )
        if self.command == "fit":
            parser.add_argument(
                "--resume",
                type=str | None,
                default=None,
                help="auto: go on from the newest whole checkpoint of this config's runs, in their folder",
            )
            parser.add_argument(
                "--test_after_fit",
                type=bool,
                default=False,
                help="evaluate the best checkpoint on the test split",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without LightningCLI's warning about ``sys.argv``, which `main` has read already."""
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]  # a list, see __init__
        except argparse.ArgumentError as error:
            if "Problems parsing config" in error.message:  # the parser does not say which file
                raise ValueError(f"config: {', '.join(self.config_paths)}: {error.message}") from error
            raise
        except Exception as error:  # the parser is not ready for every type in every place
            if is_user_error(error):
                raise
            raise _impossible(", ".join(self.config_paths) or "these arguments", error) from error

    def _parse_ckpt_path(self) -> None:
        """Only check the file: LightningCLI would silently replace the config by the checkpoint's values."""
        path = self.config[self.command].get("ckpt_path")
        if path is None and self.command != "fit":
            rank_zero_warn(f"n2uq {self.command}: no --ckpt_path, so the weights are untrained")
        if (
            path is None
            or path in _SPECIAL_CHECKPOINTS
            or "://" in str(path)
            or str(path).startswith("registry")
        ):
            return
        resuming.check_file(str(path), self.command)

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder; the config that gets saved is the one without it."""
        config = self.config[self.command]
        own_keys = {
            "ckpt_path",
            "weights_only",
            "verbose",
            "return_predictions",
            "test_after_fit",
            "config",
            "resume",
        }
        self.save_config_kwargs = {"given": config.clone(), "name": self.name, "skip": own_keys}
        self.root = str(config.trainer.default_root_dir)
        self.run_dir = self._resumed_dir(config) or run_files.create_run_dir(
            self.root, self.name, self.command
        )
        wandb = config.wandb or os.environ.get(WANDB_VARIABLE)
        if wandb != "online":
            os.environ.setdefault("WANDB_SILENT", "true")
        run_files.place_files(config, self.run_dir, self.name, wandb)

    def _resumed_dir(self, config: Any) -> str | None:  # noqa: ANN401
        """With ``--resume auto``, the folder of the run to go on with, its checkpoint put into the config."""
        mode = config.get("resume")
        resuming.check_mode(mode, config.get("ckpt_path"))
        chosen = config.checkpoint.dirpath
        path = resuming.find_checkpoint(self.root, self.name, chosen) if mode else None
        if path is None:
            return None
        config.ckpt_path = path
        folder = os.path.dirname(path)
        if chosen is not None and os.path.samefile(folder, chosen):  # the run's other files are elsewhere
            return None
        self.resumes = True
        return folder

    def instantiate_classes(self) -> None:
        """Leave no empty folder behind when a value in the config is impossible."""
        asked = dict(self.config[self.command].model.get("init_args", {}))
        try:
            super().instantiate_classes()
            self._check_linked(asked)
        except BaseException as error:
            run_files.remove_if_empty(self.run_dir, self.root)
            if isinstance(error, Exception) and not is_user_error(error):
                raise _impossible("these values", error) from error
            raise

    def _check_linked(self, asked: dict[str, Any]) -> None:
        """The parser drops a value that the data sets: without a word, were it not for this."""
        parameters = inspect.signature(type(self.model)).parameters
        for name in LINKED:
            default = parameters[name].default if name in parameters else None
            value, used = asked.get(name, default), getattr(self.datamodule, name, None)
            if value not in (default, used):
                raise ValueError(f"model.{name}: got {value!r}, allowed {used!r}, which the data has")

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out default callbacks that the Trainer's own switches turn off."""
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        unwanted: list[type[Callback]] = []
        if config.get("enable_checkpointing") is False or config.get("fast_dev_run"):
            unwanted.append(Checkpoint)
        if config.get("logger") is False:
            unwanted.append(LearningRateMonitor)
        if config.get("enable_progress_bar") is False or any(isinstance(c, ProgressBar) for c in given):
            unwanted.append(ProgressBar)
        if not self.config[self.command].non_finite_guard or any(
            isinstance(c, NonFiniteGuard) for c in given
        ):
            unwanted.append(NonFiniteGuard)
        if self.command == "fit":
            callbacks = [*callbacks, self._exact_resume()]
        plugins = config.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
        if resuming.takes_checkpoint_plugin(config) and not any(isinstance(p, CheckpointIO) for p in plugins):
            config["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super()._instantiate_trainer(
            config, [c for c in callbacks if not isinstance(c, tuple(unwanted))]
        )

    def _exact_resume(self) -> ExactResume:
        return ExactResume(self.run_dir, resuming.command_to_resume(self.arguments))

    def _run_subcommand(self, subcommand: str) -> None:
        failed = True
        try:
            if self.resumes and self.trainer.is_global_zero:
                metrics_file.put_aside(self.trainer.loggers)
            super()._run_subcommand(subcommand)
            failed = False
        except NonFiniteError:
            raise
        except Exception as error:
            if full := _write_error(error):
                raise full  # noqa: B904  # the error's own cause
            if is_out_of_memory(error):
                raise
            if self.trainer.global_step and subcommand == "fit":
                where = f"training failed at step {self.trainer.global_step}, its files are in {self.run_dir}"
                raise TrainingFailedError(where) from error
            if is_user_error(error) or _has_run_batches(self.trainer):
                raise
            raise _impossible("these values", error) from error
        finally:
            if self.resumes and self.trainer.is_global_zero:
                metrics_file.bring_back(self.trainer.loggers)  # a complete run was not continued
            run_files.finish_wandb(failed)
            run_files.remove_if_empty(self.run_dir, self.root)

    def predict(self, **arguments: Any) -> None:  # noqa: ANN401
        """Predict, and write the result: LightningCLI itself would drop it."""
        batches: Any = self.trainer.predict(**{**arguments, "return_predictions": True})
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        path = os.path.join(self.run_dir, f"predictions{f'-{rank}' if ranks > 1 else ''}.csv")
        run_files.write_predictions(batches, path)
        print(f"predictions: {path}")

    def after_fit(self) -> None:
        """Test if asked to, then say how it went and where the files are."""
        checkpoint: Any = self.trainer.checkpoint_callback
        best = getattr(checkpoint, "best_model_score", None)
        results = self._results()
        if best is not None:
            results[f"{checkpoint.monitor} (best)"] = float(best)
        if self.config[self.command].test_after_fit:
            path = None if best is None else checkpoint.best_model_path  # "best" warns of a second saver
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False)
            results.update(self._results())
        self._print_summary(results)

    def after_validate(self) -> None:
        """Say how it went."""
        self._print_summary(self._results())

    def after_test(self) -> None:
        """Say how it went."""
        self._print_summary(self._results())

    def _results(self) -> dict[str, float]:
        metrics = sorted(self.trainer.callback_metrics.items())
        return {name: value.item() for name, value in metrics if name.startswith(("val/", "test/"))}

    @rank_zero_only
    def _print_summary(self, results: dict[str, float]) -> None:
        for name, value in results.items():
            print(f"{name:<14} {value:.4f}")
        if os.path.isdir(self.run_dir) and os.listdir(self.run_dir):
            print(f"{'files':<14} {self.run_dir}")
