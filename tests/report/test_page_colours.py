"""The colours of the report page."""

import re
from importlib.resources import files


def _luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_white_numbers_are_legible_on_every_cell_of_a_dark_confusion_matrix():
    script = (files("lightning_n2uq.report") / "page.js").read_text()
    scale = re.findall(r"#[0-9a-f]{6}", re.search(r"dark: (\[\[.*\]\])", script)[1])
    assert len(scale) == 3
    for colour in scale:  # what lies between two colours lies between their contrasts, too
        red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
        assert 0.299 * red + 0.587 * green + 0.114 * blue < 128, "plotly would write in dark grey"
        assert 1.05 / (_luminance(colour) + 0.05) >= 4.5
