"""The names of a network's classes, which its checkpoint keeps: a number alone does not say what it means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

KEY = "class_names"


def saved_class_names(checkpoint: object) -> list[str] | None:
    """Returns the class names in a checkpoint, in the order of their numbers; None where it has none.

    Args:
        checkpoint: The content of a file. Data modules that know names put them into their own state, which
            Lightning keeps under the name of the data module's class.
    """
    if not isinstance(checkpoint, Mapping):
        return None
    for state in checkpoint.values():
        names = state.get(KEY) if isinstance(state, Mapping) else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def trainers_class_names(trainer: object) -> list[str] | None:
    """Returns the class names that a trainer's data module knows, None without any."""
    names = getattr(getattr(trainer, "datamodule", None), KEY, None)
    return None if names is None else list(names)


def check_class_names(saved: Sequence[str], used: Sequence[str], argument: str) -> None:
    """Refuses data whose classes are other ones, or in another order, than a checkpoint's.

    Raises:
        ValueError: They differ; one line that names the first difference.
    """
    if list(saved) == list(used):
        return
    number = next((n for n, pair in enumerate(zip(saved, used, strict=False)) if pair[0] != pair[1]), None)
    if number is None:
        raise ValueError(f"{argument}: the network knows {len(saved)} classes, the data has {len(used)}")
    raise ValueError(
        f"{argument}: class {number} of the network is {saved[number]!r}, that of the data is "
        f"{used[number]!r}; allowed are the same classes in the same order (data.classes sets them)"
    )
