"""The colours of the report page."""

import re
from importlib.resources import files

import pytest


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


GREY = _luminance("#444444")  # what plotly writes in on cells that are not dark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_numbers_are_legible_on_every_cell_of_a_confusion_matrix(theme):
    script = (files("lightning_n2uq.report") / "page.js").read_text()
    scale = re.findall(r"#[0-9a-f]{6}", re.search(rf"{theme}: (\[\[.*\]\])", script)[1])
    assert len(scale) == 3
    for colour in scale:  # what lies between two colours lies between their contrasts, too
        red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 128
        assert dark == (theme == "dark"), "plotly would write in the other colour"
        light, low = (1.0, _luminance(colour)) if dark else (_luminance(colour), GREY)
        assert (light + 0.05) / (low + 0.05) >= 4.5
