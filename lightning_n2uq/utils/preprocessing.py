"""What turns an image file into a network's input; checkpoints and exported files keep it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

KEY = "preprocessing"


@dataclass(frozen=True)
class Preprocessing:
    """Resize, central crop, then `(pixel / pixel_scale - mean) / std` by channel.

    Attributes:
        channels: 3 for RGB, 1 for greyscale; others are no image files.
        resize: The length in pixels that the image's shorter side is resized to (bilinear, antialiased);
            None where the files have the network's size already.
        crop: The height and width of the central crop, which is the network's input.
        mean: The mean of each channel, in units of `pixel_scale`.
        std: The standard deviation of each channel, in the same units.
        pixel_scale: The pixel value that stands for 1.
    """

    channels: int
    resize: int | None
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_scale: float = 255.0

    def as_dict(self) -> dict[str, object]:
        """Returns plain values, for checkpoints and JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def as_json(self) -> str:
        """Returns the text that exported files keep under `preprocessing`."""
        return json.dumps(self.as_dict())

    def __str__(self) -> str:
        """Returns the steps in words."""
        resize = "" if self.resize is None else f"shorter side to {self.resize}, "
        colour = "RGB" if self.channels == 3 else "greyscale"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return (
            f"{colour}, {resize}central crop {self.crop}x{self.crop}, "
            f"(pixel / {self.pixel_scale:g} - mean) / std, mean {mean}, std {std}"
        )


def preprocessing_from(values: Mapping[str, object], argument: str) -> Preprocessing:
    """Returns what `as_dict` gave.

    Args:
        values: The values, from a file.
        argument: The user's name for the file, used in errors.

    Raises:
        ValueError: They are of another form.
    """
    try:
        made = Preprocessing(
            channels=int(values["channels"]),  # type: ignore[call-overload]
            resize=None if values["resize"] is None else int(values["resize"]),  # type: ignore[call-overload]
            crop=int(values["crop"]),  # type: ignore[call-overload]
            mean=tuple(map(float, values["mean"])),  # type: ignore[call-overload]
            std=tuple(map(float, values["std"])),  # type: ignore[call-overload]
            pixel_scale=float(values["pixel_scale"]),  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{argument}: its preprocessing cannot be read ({error!r})") from error
    numbers = (*made.mean, *made.std, made.pixel_scale)
    fits = made.channels == len(made.mean) == len(made.std) and min(made.crop, made.resize or 1) > 0
    if not fits or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{argument}: its preprocessing is impossible ({made})")
    return made


def saved_preprocessing(checkpoint: object, argument: str = "ckpt_path") -> Preprocessing | None:
    """Returns the preprocessing in a checkpoint's content; None where it has none.

    Raises:
        ValueError: There is one of another form.
    """
    if not isinstance(checkpoint, Mapping):
        return None
    for state in checkpoint.values():
        values = state.get(KEY) if isinstance(state, Mapping) else None
        if isinstance(values, Mapping) and "crop" in values:
            return preprocessing_from(values, argument)
    return None
