"""Any image file to 8-bit pixels, upright, with the wanted number of channels."""

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_DEPTH_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # "I": 16-bit PNG files in older Pillow releases
MAX_PIXELS = 2**27  # 134 megapixels, 512 MiB decoded as RGBA: a small file may claim any size
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


class BrokenImageError(ValueError):
    """A file that cannot be decoded; the message is one line that names it."""


def decode(data: bytes, name: str, channels: int) -> "Image":
    """Decodes an encoded image completely.

    - The EXIF orientation is applied.
    - Transparent pixels are blended with white.
    - 16-bit samples keep their upper 8 bits.
    - CMYK, YCbCr, LAB, palette, bilevel and greyscale files are converted.

    Args:
        data: The file's bytes, in any format that Pillow reads.
        name: The file's name for error messages.
        channels: 1 for greyscale, 3 for RGB.

    Returns:
        A Pillow image of mode `L` or `RGB`.

    Raises:
        BrokenImageError: The bytes are no image, are cut short, hold floating point samples, or claim more
            than `MAX_PIXELS` pixels.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes on odd but readable metadata, one per file and epoch
            with Image.open(io.BytesIO(data)) as opened:
                _check_size(opened.width, opened.height)  # of the header: nothing is decoded yet
                opened.load()
                upright = ImageOps.exif_transpose(opened)
            return _convert(upright, "L" if channels == 1 else "RGB")
    # Pillow's decoders let almost any exception through: OSError, SyntaxError, struct.error, EOFError, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenImageError(f"broken image file {name}: {reason}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, allowed are {MAX_PIXELS} in all")


def _convert(image: "Image", mode: str) -> "Image":
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating point samples have no known range")
    if image.mode in _DEPTH_16:
        samples = np.asarray(image).astype(np.int64)
        image = Image.fromarray((samples.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode in ("LAB", "HSV", "YCbCr", "CMYK", "P", "1"):
        image = image.convert("RGB")  # Pillow has no direct way from some of these to L
    return image.convert(mode)
