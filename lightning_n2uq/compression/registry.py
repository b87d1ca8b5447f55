"""Named codecs, which the registered strategies use with their arguments."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lightning_n2uq.compression.alq import AdaptiveCodec
from lightning_n2uq.compression.base import Codec
from lightning_n2uq.compression.identity import IdentityCodec
from lightning_n2uq.compression.natural import NaturalCodec
from lightning_n2uq.compression.nuq import NUQCodec
from lightning_n2uq.compression.sign import SignCodec
from lightning_n2uq.compression.terngrad import TernGradCodec
from lightning_n2uq.compression.topk import TopKCodec
from lightning_n2uq.utils.validation import check_choice

_ROTATED = {"rotation": "hadamard", "levels": "gaussian"}

CODECS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "nuqsgd": {"bits": 4},
        # Two bits leave the levels 0 and 1 alone: rotated, Laplace data's relative error is 0.13, with the
        # largest coordinate of a bucket of 256 as the norm it is 2.0, with the l2 norm of 1024 it is 22.
        "nuqsgd_2bit": {"bits": 2, **_ROTATED, "rounding": "eden"},
        # The largest coordinate of a small bucket as the norm takes it from 4.7 to 0.22.
        "nuqsgd_3bit": {"bits": 3, "norm": "linf", "bucket_size": 256},
        "nuqsgd_8bit": {"bits": 8, "levels": "float"},
        "qsgd": {"bits": 4, "levels": "uniform"},
        "qsgd_inf": {"bits": 4, "levels": "uniform", "norm": "linf"},
        # Unbiased where that costs little; below, nearest levels have a fraction of the error.
        "nuqsgd_rotated": {"bits": 4, **_ROTATED},
        "nuqsgd_rotated_2bit": {"bits": 2, **_ROTATED, "rounding": "eden"},
        "nuqsgd_rotated_1bit": {"bits": 1, **_ROTATED, "rounding": "eden"},
        "alq": {"method": "alq", "bits": 4},
        "amq": {"method": "amq", "bits": 4},
        "terngrad": {"method": "terngrad"},
        "natural": {"method": "natural"},
        "signsgd": {"method": "signsgd", "error_feedback": True},
        "topk": {"method": "topk", "error_feedback": True},
    }
)
"""The settings of `ExchangeConfig` by name."""


METHODS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "nuqsgd": frozenset(
            (
                "bits",
                "bucket_size",
                "norm",
                "levels",
                "mantissa_bits",
                "coding",
                "rotation",
                "rounding",
            )
        ),
        "alq": frozenset(("bits", "bucket_size", "norm")),
        "amq": frozenset(("bits", "bucket_size", "norm")),
        "terngrad": frozenset(("bucket_size",)),
        "natural": frozenset(),
        "signsgd": frozenset(("bucket_size",)),
        "topk": frozenset(("density",)),
    }
)
"""The methods, and the arguments that each takes."""

BIASED = ("signsgd", "topk")
"""The methods that need error feedback."""


def build_codec(method: str, **arguments: Any) -> Codec:  # noqa: ANN401  # checked by the constructors
    """Builds the codec of a method.

    Args:
        method: A key of `METHODS`.
        **arguments: The method's arguments.

    Raises:
        ValueError: If the method is unknown, or an argument is not allowed.
    """
    check_choice("method", method, METHODS)
    if method == "nuqsgd":
        return NUQCodec(**arguments)
    if method in ("alq", "amq"):
        return AdaptiveCodec(family=method, **arguments)  # type: ignore[arg-type]
    kinds: dict[str, type[Codec]] = {
        "terngrad": TernGradCodec,
        "natural": NaturalCodec,
        "signsgd": SignCodec,
        "topk": TopKCodec,
    }
    return kinds[method](**arguments)


def make_codec(name: str, **arguments: Any) -> Codec:  # noqa: ANN401  # checked by the constructors
    """Builds a codec by name.

    Args:
        name: The name: `identity` or a key of `CODECS`.
        **arguments: The arguments that override those of the name.

    Raises:
        ValueError: If the name is unknown, or an argument is not allowed.
    """
    if name == "identity":
        if arguments:
            raise ValueError(f"identity takes no arguments, got {arguments!r}.")
        return IdentityCodec()
    if name not in CODECS:
        raise ValueError(f"name must be one of identity, {', '.join(CODECS)}, got {name!r}.")
    settings = {"method": "nuqsgd", **CODECS[name], **arguments}
    settings.pop("error_feedback", None)  # the exchange's
    return build_codec(**settings)
