"""Bytes: sizes, packing, special values, argument checks."""

import subprocess
import sys
import zlib

import pytest
import torch
from codec_cases import all_codecs, label, laplace
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_n2uq.compression import IdentityCodec, NUQCodec
from lightning_n2uq.ops.backends.reference.gradient_codec import pack, unpack


@given(bits=st.sampled_from([2, 3, 4, 8]), numel=st.integers(0, 70), seed=st.integers(0, 2**31))
@settings(max_examples=200, deadline=None)
def test_packing_is_a_round_trip_at_any_length(bits, numel, seed):
    codes = torch.randint(0, 1 << bits, (numel,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.numel() == (numel * bits + 7) // 8
    assert torch.equal(unpack(packed, bits, numel), codes)


def test_three_bit_codes_run_over_byte_borders():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 5])
    word = sum(code << (3 * index) for index, code in enumerate(codes.tolist()))
    assert bytes(pack(codes, 3).tolist()) == word.to_bytes(4, "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_message_sizes_are_exact_at_every_length(bits):
    codec = NUQCodec(bits=bits, bucket_size=16)
    x = laplace(50)
    for numel in range(51):
        payload = codec.encode(x[:numel], seed=numel)
        assert payload.numel() == codec.nbytes(numel) == 4 * -(-numel // 16) + -(-numel * bits // 8)
        assert codec.decode(payload, numel).shape == (numel,)
    assert codec.fixed_size


FORMAT_CHECKSUM = 2316953280


def test_format_is_stable():
    """Changing these checksums breaks runs whose ranks have different versions: raise the version then."""
    x = (torch.arange(1000) - 500).float() / 7
    sums = [zlib.crc32(bytes(codec.encode(x, seed=11).tolist())) for codec in all_codecs(64)]
    assert zlib.crc32(repr(sums).encode()) == FORMAT_CHECKSUM


@pytest.mark.parametrize("codec", all_codecs(32), ids=label)
def test_bucket_with_a_bad_entry_is_nan_and_no_other(codec):
    x = laplace(100)
    x[5], x[40], x[41] = float("nan"), float("inf"), float("-inf")
    x[64:96] = 0.0
    decoded = codec.decode(codec.encode(x, seed=1), 100)
    assert decoded[:64].isnan().all()
    assert torch.equal(decoded[64:96], torch.zeros(32))
    assert decoded[96:].isfinite().all()


def test_norm_beyond_fp32_is_nan_but_linf_is_not():
    x = torch.full((64,), 3e38)
    assert NUQCodec(bucket_size=64).decode(NUQCodec(bucket_size=64).encode(x, 0), 64).isnan().all()
    codec = NUQCodec(bucket_size=64, norm="linf")
    assert torch.equal(codec.decode(codec.encode(x, 0), 64), x)


@pytest.mark.parametrize("value", [1e-45, 1.2e-38, 1e-30, 1e30, 3.4e38])
def test_single_entry_is_exact_at_any_magnitude(value):
    x = torch.zeros(40)
    x[17] = -value
    for codec in all_codecs(40):
        assert torch.equal(codec.decode(codec.encode(x, seed=4), 40), x), codec


def test_same_seed_same_bytes_and_other_seed_other_bytes():
    codec, x = NUQCodec(), laplace(3000)
    assert torch.equal(codec.encode(x, 1), codec.encode(x, 1))
    assert not torch.equal(codec.encode(x, 1), codec.encode(x, 2))
    assert not torch.equal(codec.encode(x, 1), codec.encode(x, 1 + 2**40))


def test_buckets_of_equal_data_get_different_random_numbers():
    codec = NUQCodec(bucket_size=64)
    decoded = codec.decode(codec.encode(laplace(64).repeat(50), seed=0), 3200).view(50, 64)
    assert len({tuple(row.tolist()) for row in decoded}) == 50


def test_decode_mean_adds_in_order_and_divides():
    codec, x = NUQCodec(bits=3), laplace(5000)
    payloads = [codec.encode(x, seed) for seed in range(3)]
    expected = (
        sum((codec.decode(payload, 5000) for payload in payloads[1:]), codec.decode(payloads[0], 5000)) / 3
    )
    assert torch.equal(codec.decode_mean(payloads, 5000), expected)
    assert torch.equal(codec.decode_mean(torch.stack(payloads), 5000), expected)
    padded = torch.zeros(3, payloads[0].numel() + 3, dtype=torch.uint8)
    padded[:, 1:-2] = torch.stack(payloads)
    assert torch.equal(codec.decode_mean(padded[:, 1:-2], 5000), expected)


@pytest.mark.parametrize("codec", [NUQCodec(), IdentityCodec(), NUQCodec(coding="huffman")], ids=repr)
def test_buffers_are_used_and_may_be_unaligned(codec):
    x = laplace(3001)
    storage = torch.zeros(codec.nbytes(3001) + 9, dtype=torch.uint8)
    payload = codec.encode(x, seed=3, out=storage[5:])
    assert payload.data_ptr() == storage.data_ptr() + 5
    assert torch.equal(payload, codec.encode(x, seed=3))
    result = torch.empty(3001)
    assert codec.decode(payload, 3001, out=result) is result
    assert torch.equal(result, codec.decode(codec.encode(x, seed=3), 3001))


def test_non_contiguous_input_is_read_correctly():
    x = laplace(4000)
    assert torch.equal(NUQCodec().encode(x[::2], 1), NUQCodec().encode(x[::2].clone(), 1))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"bits": 5}, "bits"),
        ({"bucket_size": 100}, "bucket_size"),
        ({"bucket_size": 1 << 16}, "bucket_size"),
        ({"norm": "l1"}, "norm"),
        ({"levels": "cubic"}, "levels"),
        ({"levels": [0.0, 0.5, 1.0]}, "levels"),
        ({"bits": 2, "levels": [0.0, 0.5]}, "levels"),
        ({"bits": 3, "levels": [0.0, 0.5, 0.4, 1.0]}, "levels"),
        ({"mantissa_bits": 2}, "mantissa_bits"),
        ({"bits": 8, "levels": "float", "mantissa_bits": 7}, "mantissa_bits"),
        ({"coding": "zip"}, "coding"),
    ],
)
def test_constructor_names_the_bad_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        NUQCodec(**arguments)


@pytest.mark.parametrize(
    "x", [torch.zeros(4, dtype=torch.float64), torch.zeros(2, 2), torch.zeros(4).half(), [1.0]]
)
def test_encode_refuses_what_is_no_fp32_vector(x):
    for codec in (NUQCodec(), IdentityCodec()):
        with pytest.raises(ValueError, match="x must be"):
            codec.encode(x, 0)


def test_buffers_of_the_wrong_kind_are_refused():
    codec, x = NUQCodec(), laplace(100)
    payload = codec.encode(x, 0)
    with pytest.raises(ValueError, match="out must be"):
        codec.encode(x, 0, out=torch.empty(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out must be"):
        codec.decode(payload, 100, out=torch.empty(99))
    size = codec.nbytes(100)
    for other in (
        torch.empty(size),
        torch.empty(size, dtype=torch.int8),
        torch.empty(1, size, dtype=torch.uint8),
        torch.empty(2 * size, dtype=torch.uint8)[::2],
    ):
        with pytest.raises(ValueError, match="out must be a contiguous 1-D uint8 tensor"):
            codec.encode(x, 0, out=other)
    with pytest.raises(ValueError, match="at least one message"):
        codec.decode_mean([], 100)
    with pytest.raises(ValueError, match="numel"):
        codec.decode(payload, -1)


@pytest.mark.integration
def test_import_is_cheap():
    code = (
        "import sys, lightning_n2uq.compression as c; c.NUQCodec();"
        "print([m for m in ('numba', 'triton') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
