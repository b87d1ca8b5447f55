"""What the ranks of one exchange have to agree on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor

from lightning_n2uq.compression import BIASED, METHODS, Codec, build_codec
from lightning_n2uq.utils.validation import check, check_choice, check_integer

SCHEMES = ("two_phase", "all_gather")


@dataclass(frozen=True)
class ExchangeConfig:
    """Settings of a compressed gradient exchange; equal on every rank, checked by the handshake.

    Args:
        method: How gradients are compressed: `nuqsgd` (with `levels`, `norm` and `rotation`, also QSGD and
            EDEN), `alq`, `amq`, `terngrad`, `natural`, `signsgd` or `topk`.
        bits: The bits per coordinate, sign included: 2, 3, 4 or 8; with rotation 1 to 4.
        bucket_size: The number of coordinates that share one norm; with rotation a power of two.
        norm: The norm of a bucket, `l2` (NUQSGD, QSGD) or `linf`; not used with rotation.
        levels: The family of levels (`exponential`, `uniform` or `float`; `gaussian` with rotation), or the
            list of levels. None takes `exponential`, with rotation `gaussian`.
        mantissa_bits: The mantissa bits kept by `levels="float"`.
        coding: How codes are written, `packed`, or `huffman` for slow links.
        rotation: How buckets are rotated before they are quantized: `none`, or `hadamard` (at random).
        rounding: `stochastic` (unbiased), or with rotation `eden` (nearest level, the smallest error).
        density: The share of coordinates that `topk` sends.
        adapt_every: The number of steps after which `alq` and `amq` estimate their levels anew.
        scheme: `two_phase`, or `all_gather` (the paper's; bytes grow with the number of ranks).
        second_phase_bits: The bits of the averaged chunk in the second phase; `bits` if None.
        hierarchical: Whether to reduce in full precision inside a node and compress between nodes only.
        ranks_per_node: The ranks of a node; this node's processes if None.
        error_feedback: Whether to add what compression lost to the next gradient.
        warmup_steps: The number of first steps that are exchanged in full precision.
        skip_patterns: Globs of the names of parameters that travel in full precision.
        min_numel: Parameters with fewer elements, and all 1-D ones, travel in full precision.
        unit_numel: Gradients are pipelined in pieces of about this many coordinates. Smaller pieces
            overlap better on slow links and cost more processor time.
        seed: The base seed of the stochastic rounding.

    Raises:
        ValueError: If a value is not allowed; the message names the argument.
    """

    method: Literal["nuqsgd", "alq", "amq", "terngrad", "natural", "signsgd", "topk"] = "nuqsgd"
    bits: int = 4
    bucket_size: int = 1024
    norm: Literal["l2", "linf"] = "l2"
    levels: str | Sequence[float] | None = None
    mantissa_bits: int | None = None
    coding: Literal["packed", "huffman"] = "packed"
    rotation: Literal["none", "hadamard"] = "none"
    rounding: Literal["stochastic", "eden"] = "stochastic"
    density: float = 0.01
    adapt_every: int = 100
    scheme: Literal["two_phase", "all_gather"] = "two_phase"
    second_phase_bits: int | None = None
    hierarchical: bool = False
    ranks_per_node: int | None = None
    error_feedback: bool = False
    warmup_steps: int = 0
    skip_patterns: tuple[str, ...] = ()
    min_numel: int = 256
    unit_numel: int = 1 << 20
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip_patterns", tuple(self.skip_patterns))
        check_choice("scheme", self.scheme, SCHEMES)
        check_choice("method", self.method, METHODS)
        self._refuse_unused()
        for name in ("warmup_steps", "min_numel", "seed"):
            check_integer(name, getattr(self, name), 0)
        for name in ("unit_numel", "adapt_every"):
            check_integer(name, getattr(self, name), 1)
        if self.ranks_per_node is not None:
            check_integer("ranks_per_node", self.ranks_per_node, 1)
        if self.second_phase_bits is not None:
            allowed = "with scheme='two_phase' only"
            check(self.scheme == "two_phase", "second_phase_bits", self.second_phase_bits, allowed)
        codecs = (self.codec(), self.second_codec())  # raises on a bad codec argument
        if self.error_feedback:
            self._require_contraction(max(codecs, key=lambda codec: codec.variance_bound()))

    def _refuse_unused(self) -> None:
        """Raises where the method does not use what a user has set, or needs what is missing."""
        used = METHODS[self.method] | {"bucket_size"}  # chunks are cut at multiples of it in any case
        if "bits" in used:
            used |= {"second_phase_bits"}
        if self.method in ("alq", "amq"):
            used |= {"adapt_every"}
        for name in sorted({"second_phase_bits", "adapt_every"}.union(*METHODS.values()) - used):
            default = self.__dataclass_fields__[name].default
            value = getattr(self, name)
            check(value == default, name, value, f"is {default!r} with method={self.method!r}")
        if self.method in BIASED:
            why = f"is true with method={self.method!r}, whose messages are biased"
            check(self.error_feedback, "error_feedback", self.error_feedback, why)

    def _require_contraction(self, codec: Codec) -> None:
        """Residuals of an unbiased codec grow without bound unless its relative variance is below 1."""
        bound = codec.variance_bound()
        if bound >= 1.0:
            raise ValueError(
                f"error_feedback: needs a codec with variance bound < 1, got {bound:.3g} for "
                f"{codec.describe()}: raise bits or lower bucket_size"
            )

    def codec(self) -> Codec:
        """Returns the codec of the first phase."""
        return build_codec(self.method, **{name: getattr(self, name) for name in METHODS[self.method]})

    def second_codec(self) -> Codec:
        """Returns the codec of the second phase."""
        if self.second_phase_bits is None:
            return self.codec()
        return replace(
            self, bits=self.second_phase_bits, second_phase_bits=None, error_feedback=False
        ).codec()

    def travels_exactly(self, name: str, parameter: Tensor) -> bool:
        """Returns whether a parameter travels in full precision."""
        small = parameter.dim() <= 1 or parameter.numel() < self.min_numel
        return small or any(fnmatchcase(name, pattern) for pattern in self.skip_patterns)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raises ValueError where one of `skip_patterns` matches none of a module's parameters."""
        known = list(names)
        for pattern in self.skip_patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise ValueError(f"skip_patterns: got {pattern!r}, which matches no parameter of the module")

    def geometry(self) -> dict[str, Any]:
        """Returns what decides which rank handles which coordinates of a bucket."""
        names = ("bucket_size", "scheme", "hierarchical", "ranks_per_node", "unit_numel")
        return {name: getattr(self, name) for name in names}

    def fields(self) -> dict[str, Any]:
        """Returns what the handshake compares, under the names users set."""
        names = self.__dataclass_fields__
        return {name: getattr(self, name) for name in names if name != "levels"} | {
            "levels": str(self.levels or ("gaussian" if self.rotation == "hadamard" else "exponential"))
        }


def take_fields(config: type, arguments: dict[str, Any]) -> dict[str, Any]:
    """Takes the fields of a dataclass out of keyword arguments; what is left is somebody else's.

    Args:
        config: The dataclass.
        arguments: All keyword arguments; those that are returned are removed.
    """
    return {one.name: arguments.pop(one.name) for one in fields(config) if one.name in arguments}
