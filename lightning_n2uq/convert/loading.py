"""`load_from_checkpoint` of quantized modules: a fresh module of the user's class is converted first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning_n2uq.convert.record import KEY, Record, record_of, restore
from lightning_n2uq.utils import compat_lightning


def convert_when_loading() -> None:
    """Makes Lightning's `load_from_checkpoint` convert modules whose checkpoint says that they are quantized.

    Lightning asks nothing of callbacks there. Other checkpoints load as ever; a second call does nothing.
    """
    compat_lightning.wrap_loading(_wrapped)


def _wrapped(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_converted(cls: type, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if KEY not in checkpoint or not hasattr(cls, "load_state_dict"):
            return load(cls, checkpoint, *args, **kwargs)
        record = Record.from_mapping(checkpoint[KEY], "checkpoint_path")
        module = load(_converting(cls, record), checkpoint, *args, **kwargs)
        module.__class__ = cls
        return module

    return load_converted


def _converting(cls: Any, record: Record) -> type:  # noqa: ANN401 -- a class of the user's
    """Returns a subclass that converts itself before its state dict is loaded."""

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if record_of(self) is None:
            restore(self, record, "checkpoint_path")
        return cls.load_state_dict(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"load_state_dict": load_state_dict, "__module__": cls.__module__})
