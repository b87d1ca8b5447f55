"""Tensors without values in memory are refused; the smallest numbers are unbiased to half a float32 step."""

import pytest
import torch

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.compression.identity import IdentityCodec
from lightning_n2uq.ops.backends.reference import gradient_codec as reference

SMALLEST = 2.0**-149  # the smallest positive float32
CODECS = [
    NUQCodec(),
    NUQCodec(bits=8, levels="float", mantissa_bits=3),
    NUQCodec(coding="huffman"),
    IdentityCodec(),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_sparse_and_meta_tensors_are_refused(codec, kind):
    def unusual(x):
        return x.to_sparse() if kind == "sparse" else x.to("meta")

    x = torch.randn(64)
    payload = codec.encode(x, 0)
    with pytest.raises(ValueError, match="x must be a dense 1-D float32 tensor, got "):
        codec.encode(unusual(x), 0)
    with pytest.raises(ValueError, match="out must be"):
        codec.encode(x, 0, out=unusual(torch.empty(codec.nbytes(64), dtype=torch.uint8)))
    with pytest.raises(ValueError, match="payload must be a dense 1-D uint8 tensor, got "):
        codec.decode(unusual(payload), 64)
    with pytest.raises(ValueError, match="out must be"):
        codec.decode(payload, 64, out=unusual(torch.empty(64)))
    with pytest.raises(ValueError, match="payload must be a dense"):
        codec.decode_mean([payload, unusual(payload)], 64)


@pytest.mark.parametrize("size", [1e-44, 1e-42, 1e-40, 1e-38, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("levels", ["exponential", "uniform"])
def test_the_smallest_numbers_are_unbiased_to_half_of_the_smallest_step(size, bits, levels):
    """The mean over evenly spread random words is the expectation, to a gap of levels over their number."""
    codec = NUQCodec(bits=bits, bucket_size=64, levels=levels)
    x = torch.randn(64, generator=torch.Generator().manual_seed(4)) * size
    count = 4096
    words = (torch.arange(count) * (2**32 // count) + 2**31 // count).unsqueeze(1).expand(count, 64)
    message = reference.encoded(x.repeat(count), codec.form, words)
    mean = codec.decode(message, 64 * count).double().view(count, 64).mean(0)
    norm = float(reference.bucket_norms(x.unsqueeze(0), "l2")[0])
    assert (mean - x.double()).abs().max() <= SMALLEST / 2 + norm * (1 / count + 2.0**-20)
