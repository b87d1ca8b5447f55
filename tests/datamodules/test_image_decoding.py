"""Every kind of image file becomes upright 8-bit pixels; a broken one is named."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from lightning_n2uq.datamodules._data.decode import BrokenImageError, decode

RED = (200, 30, 60)


def encoded(image, file_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(data, channels=3):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(data, "file", channels)
    assert image.mode == ("RGB" if channels == 3 else "L")
    return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_png_modes_keep_black_and_white(mode, channels):
    array = np.zeros((6, 4, 3), np.uint8)
    array[:3] = 255

    found = pixels(encoded(Image.fromarray(array).convert("L").convert(mode)), channels)

    assert found.shape[:2] == (6, 4)
    assert found[:3].min() == 255
    assert found[3:].max() == 0


@pytest.mark.parametrize(
    ("mode", "file_format"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF")]
)
def test_other_colour_spaces(mode, file_format):
    if mode == "LAB":
        image = Image.new("LAB", (16, 16), (0, 128, 128))
        expected = (0, 0, 0)
    else:
        image = Image.new("RGB", (16, 16), RED).convert(mode)
        expected = RED

    found = pixels(encoded(image, file_format))

    assert np.abs(found.astype(int) - expected).max() <= 6


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_samples_keep_their_upper_bits(file_format):
    samples = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)

    found = pixels(encoded(Image.fromarray(samples), file_format), channels=1)

    assert found.tolist() == [[0, 0, 1], [128, 255, 255]]


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))

    assert pixels(encoded(image))[0].tolist() == [list(RED), [255, 255, 255]]


def test_transparent_palette_entry_becomes_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)

    assert pixels(encoded(image, transparency=1))[0].tolist() == [[10, 20, 30], [255, 255, 255]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8] = 255  # a mark in the upper left corner
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.T, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))

    found = pixels(encoded(stored, "JPEG", exif=exif, quality=95), channels=1)

    assert found.shape == (16, 32)
    assert found[:8, :8].min() > 240
    assert found[8:].max() < 15


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_truncated_file_is_named(file_format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encoded(Image.fromarray(noise), file_format)

    with pytest.raises(BrokenImageError, match=r"^broken image file a/b\.jpg: \S[^\n]*$"):
        decode(data[: len(data) // 2], "a/b.jpg", 3)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\xff\xd8\xff\xe0"])
def test_anything_else_is_named(data):
    with pytest.raises(BrokenImageError, match=r"broken image file x\.png"):
        decode(data, "x.png", 1)


def test_floating_point_samples_are_refused():
    image = Image.fromarray(np.ones((4, 4), np.float32))

    with pytest.raises(BrokenImageError, match="floating point"):
        decode(encoded(image, "TIFF"), "depth.tif", 1)
