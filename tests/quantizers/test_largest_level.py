"""What a weight quantizer says of its largest integer is what its integers are."""

import pytest
import torch

from lightning_n2uq.quantizers import WEIGHT_QUANTIZERS, allowed_bits, weight_quantizer

NAMES = [name for name in WEIGHT_QUANTIZERS if name != "float"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [2, 4, 8])
def test_the_largest_level_is_the_largest_integer_or_0_without_integers(name: str, wanted: int) -> None:
    low, high = allowed_bits(WEIGHT_QUANTIZERS[name])
    quantizer = weight_quantizer(name, min(max(wanted, low), high)).train()
    weight = 3 * torch.randn(4, 50_000)
    quantizer(weight)
    found = quantizer.weight_grid(40 * weight)  # beyond the ends of a learned range
    if found is None:
        assert quantizer.largest_level == 0
    else:
        assert int(found[0].int().abs().max()) == quantizer.largest_level
