"""The Trainer's sub-commands: a LightningCLI with this package's classes, defaults and run folders."""

from __future__ import annotations

import argparse
import os
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

# Imported for their names: short class names and strategy names are known once their module is.
import lightning_n2uq.callbacks
import lightning_n2uq.datamodules
import lightning_n2uq.modules
import lightning_n2uq.strategies  # noqa: F401
from lightning_n2uq.checkpointing import ExactResume, metrics_file
from lightning_n2uq.checkpointing.signals import ending_at_once
from lightning_n2uq.cli import processes, resuming, run_files, run_lock
from lightning_n2uq.cli.arguments import (
    SPECIAL_CHECKPOINTS,
    command_to_resume,
    resolve_arguments,
    with_saved_config,
)
from lightning_n2uq.cli.checkpoint_path import is_file_name
from lightning_n2uq.cli.configs import check_arguments, check_config, run_name
from lightning_n2uq.cli.errors import is_user_error
from lightning_n2uq.cli.failures import impossible, meaning
from lightning_n2uq.cli.layers import check_layers
from lightning_n2uq.cli.monitors import CheckMonitors
from lightning_n2uq.cli.own_code import check_importable, class_of, own_error, see_current_folder
from lightning_n2uq.cli.parser import (
    CALLBACK_DEFAULTS,
    LINKED,
    OWN_KEYS,
    TRAINER_DEFAULTS,
    WANDB_VARIABLE,
    Link,
    add_options,
    check_linked,
)
from lightning_n2uq.cli.predictions import PredictionsFile
from lightning_n2uq.cli.quiet import quiet_lightning
from lightning_n2uq.cli.rank_failures import check_meeting_place
from lightning_n2uq.cli.run_record import RunRecord
from lightning_n2uq.cli.shorthands import spelled_out
from lightning_n2uq.cli.trainer_parts import plugins_with_checkpoint_io, wanted_callbacks
from lightning_n2uq.modules.finders import refuse_finders
from lightning_n2uq.utils import compat, compat_lightning

compat.require(LightningCLI, "_parse_ckpt_path", "_instantiate_trainer", "_run_subcommand", "_parser")


def run_training_command(command: str, arguments: list[str]) -> int:
    """Runs `fit`, `validate`, `test` or `predict` with its arguments; returns the exit code."""
    quiet_lightning()
    check_arguments(arguments)
    arguments, paths = resolve_arguments(with_saved_config(arguments))
    for path in paths:
        check_config(path)
    check_layers(paths)
    see_current_folder()
    check_importable(paths, arguments)
    arguments = spelled_out(arguments, paths)
    with ending_at_once():
        N2UQCLI(command, arguments, paths)
    return 0


class N2UQCLI(LightningCLI):
    """LightningCLI for one sub-command (parsers of the others would only cost time).

    Args:
        command: `fit`, `validate`, `test` or `predict`.
        arguments: Command-line arguments after the sub-command, configs given by path.
        config_paths: The configs among the arguments; they name the run.
    """

    def __init__(self, command: str, arguments: list[str], config_paths: list[str]) -> None:
        self.command, self.arguments = command, arguments
        self.config_paths = config_paths
        self.name = run_name(config_paths)
        self.root = self.run_dir = ""
        self.resumes = False
        self.lock = run_lock.RunLock()
        self.links = [Link(name) for name in LINKED]
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
        """Returns only the sub-command that was asked for."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds what every run has beside Lightning's own options."""
        add_options(parser, self.command, self.links)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses without LightningCLI's warning about `sys.argv`, which `main` has read already."""
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]  # a list, see __init__
        except argparse.ArgumentError as error:
            if "Problems parsing config" in error.message:  # the parser does not say which file
                raise ValueError(f"config: {', '.join(self.config_paths)}: {error.message}") from error
            raise
        except Exception as error:  # the parser is not ready for every type in every place
            if is_user_error(error):
                raise
            raise impossible(", ".join(self.config_paths) or "these arguments", error) from error

    def _parse_ckpt_path(self) -> None:
        """Only checks the file: LightningCLI would silently replace the config by the checkpoint's values."""
        path = self.config[self.command].get("ckpt_path")
        if path is None and self.command != "fit":
            rank_zero_warn(f"n2uq {self.command}: no --ckpt_path, so the weights are untrained")
        if is_file_name(path):
            resuming.check_file(str(path), self.command)

    def before_instantiate_classes(self) -> None:
        """Chooses the run's folder; the config that gets saved is the one without it."""
        config = self.config[self.command]
        text = run_files.config_text(self._parser(self.command), config, self.name, OWN_KEYS)
        self.save_config_kwargs = {"text": text}
        self.root = str(config.trainer.default_root_dir)
        self.run_dir = self._resumed_dir(config, text) or run_files.create_run_dir(
            self.root, self.name, self.command
        )
        resuming.keep_classes(config)
        wandb = config.wandb or os.environ.get(WANDB_VARIABLE)
        if wandb != "online":
            os.environ.setdefault("WANDB_SILENT", "true")
        run_files.place_files(config, self.run_dir, self.name, wandb, self._evaluated_run(config))
        if self.command == "fit" and not getattr(rank_zero_only, "rank", 0):
            self._lock(str(config.checkpoint.dirpath))

    def _evaluated_run(self, config: Any) -> str | None:  # noqa: ANN401
        """Returns the folder of the run whose checkpoint is evaluated, where the file lies in one."""
        path = config.get("ckpt_path")
        if self.command == "fit" or path is None or not os.path.isfile(str(path)):
            return None
        folder = os.path.dirname(os.path.abspath(str(path)))
        return folder if os.path.isdir(os.path.join(folder, "wandb")) else None

    def _lock(self, checkpoints: str) -> None:
        """Locks what the run writes to, or leaves no empty folder behind."""
        try:
            self.lock.take(self.run_dir, checkpoints)
        except ValueError:
            run_files.remove_if_empty(self.run_dir, self.root)
            raise

    def _resumed_dir(self, config: Any, text: str) -> str | None:  # noqa: ANN401
        """With `--resume auto`, the folder of the run to go on with, its checkpoint put into the config."""
        mode, asked = config.get("resume"), config.get("ckpt_path")
        resuming.check_mode(mode, asked)
        chosen = config.checkpoint.dirpath
        if self.command == "fit" and asked is not None and asked not in SPECIAL_CHECKPOINTS:
            resuming.check_settings(str(asked), text)
        path = resuming.find_checkpoint(self.root, self.name, chosen, text) if mode else None
        if path is None:
            return None
        config.ckpt_path = path
        folder = os.path.dirname(path)
        if chosen is not None and os.path.samefile(folder, chosen):  # the run's other files are elsewhere
            return None
        self.resumes = True
        return folder

    def instantiate_classes(self) -> None:
        """Leaves no empty folder behind when a value in the config is impossible."""
        model = self.config[self.command].model
        asked = dict(model.get("init_args", {}))
        for link in self.links:
            link.asked, link.model = asked, class_of(model.class_path)
        try:
            super().instantiate_classes()
            check_linked(self.model, self.datamodule, asked)
        except BaseException as error:
            self.lock.release()
            run_files.remove_if_empty(self.run_dir, self.root)
            if isinstance(error, Exception) and (own := own_error(error)) is not None:
                raise own from error
            if isinstance(error, Exception) and not is_user_error(error):
                raise impossible("these values", error) from error
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leaves out what the Trainer's own switches turn off, and adds what writes and resumes."""
        callbacks = [*callbacks, CheckMonitors(chosen_by_default=self._monitor_is_default())]
        if self.command == "fit":
            resume = ExactResume(self.run_dir, command_to_resume(self.arguments))
            callbacks = [*callbacks, resume, RunRecord(self.run_dir)]
        if self.command == "predict":
            callbacks = [*callbacks, PredictionsFile(self.run_dir)]
        config["plugins"] = plugins_with_checkpoint_io(config)
        guard = self.config[self.command].non_finite_guard
        trainer = super()._instantiate_trainer(config, wanted_callbacks(config, callbacks, guard))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                compat_lightning.without_void_settings(logger)
        if self.command == "fit":
            refuse_finders(trainer.callbacks)  # type: ignore[attr-defined]
        return trainer

    def _monitor_is_default(self) -> bool:
        """Returns whether the checkpoint watches what it does because nobody has said otherwise."""
        values = self.config[self.command].checkpoint
        names = ("monitor", "mode")
        return all(values.get(name) == CALLBACK_DEFAULTS[f"checkpoint.{name}"] for name in names)

    def _run_subcommand(self, subcommand: str) -> None:
        failed = True
        try:
            self._meet()
            if self.resumes and self.trainer.is_global_zero:
                metrics_file.put_aside(self.trainer.loggers)
            super()._run_subcommand(subcommand)
            failed = False
        except Exception as error:
            processes.ending.set()
            shown = meaning(error, self.trainer, subcommand, self.run_dir)
            if shown is error:
                raise
            raise shown from shown.__cause__ or error
        finally:
            if self.resumes and self.trainer.is_global_zero:
                metrics_file.bring_back(self.trainer.loggers)  # a complete run was not continued
            run_files.finish_wandb(failed)
            self.lock.release()
            run_files.remove_if_empty(self.run_dir, self.root)

    def _meet(self) -> None:
        """Looks at the ranks' meeting place before anybody waits there, and watches children."""
        environment = compat_lightning.cluster_environment(self.trainer)
        if self.trainer.world_size == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return
        check_meeting_place(
            environment.main_address, environment.main_port, listens=environment.global_rank() == 0
        )
        if compat_lightning.starts_children(self.trainer):
            processes.announce_launcher()
            compat_lightning.observe_children_with(processes.observe_children)

    def predict(self, **arguments: Any) -> None:  # noqa: ANN401
        """Predicts; `PredictionsFile` writes the result, and nothing is kept besides."""
        self.trainer.predict(**{**arguments, "return_predictions": False})

    def after_fit(self) -> None:
        """Tests if asked to, then says how it went and where the files are."""
        checkpoint: Any = self.trainer.checkpoint_callback
        best = getattr(checkpoint, "best_model_score", None)
        results = self._results()
        run_files.summarize_best(self.trainer, checkpoint)
        if self.config[self.command].test_after_fit:
            path = None if best is None else checkpoint.best_model_path  # "best" warns of a second saver
            self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=path, verbose=False)
            results.update({name: value for name, value in self._results().items() if name[:5] == "test/"})
        self._print_summary(results, None if best is None else (str(checkpoint.monitor), float(best)))

    def after_validate(self) -> None:
        """Says how it went."""
        self._print_summary(self._results())

    def after_test(self) -> None:
        """Says how it went."""
        self._print_summary(self._results())

    def _results(self) -> dict[str, float]:
        metrics = sorted(self.trainer.callback_metrics.items())
        return {name: value.item() for name, value in metrics if name.startswith(("val/", "test/"))}

    @rank_zero_only
    def _print_summary(self, results: dict[str, float], best: tuple[str, float] | None = None) -> None:
        """Prints the last epoch's metrics, the best score, and the best checkpoint's test, each as such."""
        for name, value in results.items():
            when = "" if best is None else " (best)" if name.startswith("test/") else " (last)"
            print(f"{name + when:<14} {value:.4f}")
        if best is not None:
            print(f"{best[0] + ' (best)':<14} {best[1]:.4f}")
        if os.path.isdir(self.run_dir) and set(os.listdir(self.run_dir)) - {run_lock.NAME}:
            print(f"{'files':<14} {self.run_dir}")
