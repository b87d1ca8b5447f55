"""Named codecs, which the registered strategies use with their arguments."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lightning_n2uq.compression.base import Codec
from lightning_n2uq.compression.identity import IdentityCodec
from lightning_n2uq.compression.nuq import NUQCodec

_ROTATED = {"rotation": "hadamard", "levels": "gaussian"}

CODECS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "nuqsgd": {"bits": 4},
        # With so few levels the smallest is far above most of |v| / ||v||_2. The largest coordinate of a
        # small bucket as the norm takes Laplace data's relative variance from 22 to 2.1 and 4.7 to 0.22.
        "nuqsgd_2bit": {"bits": 2, "norm": "linf", "bucket_size": 256},
        "nuqsgd_3bit": {"bits": 3, "norm": "linf", "bucket_size": 256},
        "nuqsgd_8bit": {"bits": 8, "levels": "float"},
        "qsgd": {"bits": 4, "levels": "uniform"},
        "qsgd_inf": {"bits": 4, "levels": "uniform", "norm": "linf"},
        # Unbiased where that costs little; below, nearest levels have a fraction of the error.
        "nuqsgd_rotated": {"bits": 4, **_ROTATED},
        "nuqsgd_rotated_2bit": {"bits": 2, **_ROTATED, "rounding": "eden"},
        "nuqsgd_rotated_1bit": {"bits": 1, **_ROTATED, "rounding": "eden"},
    }
)
"""The arguments of `NUQCodec` by name."""


def make_codec(name: str, **arguments: Any) -> Codec:  # noqa: ANN401  # checked by NUQCodec's constructor
    """Builds a codec by name.

    Args:
        name: The name: `identity` or a key of `CODECS`.
        **arguments: The arguments of `NUQCodec` that override those of the name.

    Raises:
        ValueError: If the name is unknown, or an argument is not allowed.
    """
    if name == "identity":
        if arguments:
            raise ValueError(f"identity takes no arguments, got {arguments!r}.")
        return IdentityCodec()
    if name not in CODECS:
        raise ValueError(f"name must be one of identity, {', '.join(CODECS)}, got {name!r}.")
    return NUQCodec(**{**CODECS[name], **arguments})
