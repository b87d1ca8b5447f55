"""Builds what a config names, for commands that do not train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.cli.arguments import resolve_arguments, with_saved_config
from lightning_n2uq.cli.configs import check_arguments, check_config
from lightning_n2uq.cli.errors import is_user_error
from lightning_n2uq.cli.failures import impossible
from lightning_n2uq.cli.layers import check_layers
from lightning_n2uq.cli.own_code import check_importable, class_of, own_error, see_current_folder
from lightning_n2uq.cli.parser import check_linked
from lightning_n2uq.cli.shorthands import long_names, spelled_out
from lightning_n2uq.cli.training import N2UQCLI
from lightning_n2uq.convert.record import KEY, Record, restore
from lightning_n2uq.utils.state_dicts import named_like
from lightning_n2uq.utils.validation import check


@dataclass(frozen=True)
class Built:
    """The objects of a config, without a trainer or a run's folder.

    Attributes:
        model: The module; `configure_model` has not been called.
        data: The data module.
        callbacks: The trainer's.
        config: Everything as parsed.
        paths: The configs, by path.
    """

    model: LightningModule
    data: LightningDataModule
    callbacks: list[Callback]
    config: Any
    paths: list[str]


def build(arguments: Sequence[str]) -> Built:
    """Builds the model, the data and the callbacks of `n2uq fit ARGUMENTS`.

    Raises:
        ValueError: A config, a class or a value is impossible; one line.
    """
    given = long_names(list(arguments))
    check_arguments(given)
    resolved, paths = resolve_arguments(with_saved_config(given))
    for path in paths:
        check_config(path)
    check_layers(paths)
    see_current_folder()
    check_importable(paths, resolved)
    return _Building("fit", spelled_out(resolved, paths), paths).built


def load_weights(module: LightningModule, path: str, argument: str) -> None:
    """Loads a checkpoint into a module that `build` has built, converted first where the checkpoint says so.

    Args:
        module: The module; `configure_model` has been called.
        path: The checkpoint.
        argument: The user's name for it, used in errors.

    Raises:
        ValueError: The file is no checkpoint of this module; one line.
    """
    checkpoint = read_file(path, argument)
    fits = isinstance(checkpoint, Mapping) and "state_dict" in checkpoint
    check(fits, argument, path, "is a checkpoint of a LightningModule")
    if KEY in checkpoint:
        restore(module, Record.from_mapping(checkpoint[KEY], argument), argument)
    try:
        module.load_state_dict(named_like(checkpoint["state_dict"], module.state_dict()))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{argument}: {path!r} is of another network than the config's ({reason})"
        ) from error


class _Building(N2UQCLI):
    built: Built

    def before_instantiate_classes(self) -> None:
        """Leaves out what writes: no run folder, no loggers."""
        self.config[self.command].trainer.logger = None

    def instantiate_classes(self) -> None:
        """Builds everything but the trainer."""
        config = self.config[self.command]
        asked = dict(config.model.get("init_args", {}))
        if "integer_evaluation" in asked:  # it would look at weights that change from trial to trial
            config.model.init_args.integer_evaluation = "off"
        for link in self.links:
            link.asked, link.model = asked, class_of(config.model.class_path)
        try:
            objects = self.parser.instantiate_classes(self.config)[self.command]
            check_linked(objects.model, objects.data, asked)
        except Exception as error:
            if (own := own_error(error)) is not None:
                raise own from error
            if not is_user_error(error):
                raise impossible("these values", error) from error
            raise
        callbacks = list(objects.trainer.callbacks or [])
        self.built = Built(objects.model, objects.data, callbacks, config, self.config_paths)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""
