"""Gradient codecs: levels, packing, Huffman coding, theory, and wrappers around codecs.

Reading order: `ops.formats.gradient_codec` (bytes) -> `ops.backends.reference.gradient_codec` (arithmetic)
-> `nuq` -> `theory` -> wrappers.
"""

from lightning_n2uq.compression.alq import AdaptiveCodec
from lightning_n2uq.compression.base import Codec
from lightning_n2uq.compression.feedback import ErrorFeedback
from lightning_n2uq.compression.identity import IdentityCodec, codec_at_step
from lightning_n2uq.compression.natural import NaturalCodec
from lightning_n2uq.compression.nuq import NUQCodec
from lightning_n2uq.compression.registry import BIASED, CODECS, METHODS, build_codec, make_codec
from lightning_n2uq.compression.sign import SignCodec
from lightning_n2uq.compression.skip import SkipCodec
from lightning_n2uq.compression.terngrad import TernGradCodec
from lightning_n2uq.compression.topk import TopKCodec
from lightning_n2uq.ops.backends.common.rng import MessageSeed, mix_seed

__all__ = [
    "BIASED",
    "CODECS",
    "METHODS",
    "AdaptiveCodec",
    "Codec",
    "ErrorFeedback",
    "IdentityCodec",
    "MessageSeed",
    "NUQCodec",
    "NaturalCodec",
    "SignCodec",
    "SkipCodec",
    "TernGradCodec",
    "TopKCodec",
    "build_codec",
    "codec_at_step",
    "make_codec",
    "mix_seed",
]
