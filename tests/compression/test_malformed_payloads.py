"""Damaged messages: ValueError or legal values, never a read or write outside, whatever the damage."""

import random

import pytest
import torch
from codec_cases import laplace

from lightning_n2uq.compression import IdentityCodec, NUQCodec, SkipCodec

NUMEL = 1003
CASES = [
    (NUQCodec(bits=4, bucket_size=64), 4000),
    (NUQCodec(bits=3, bucket_size=64), 4000),
    (NUQCodec(bits=2, bucket_size=1024, coding="huffman"), 2000),
    (NUQCodec(bits=3, bucket_size=1024, coding="huffman"), 1000),
    (SkipCodec(NUQCodec(bits=2), [(10, 20)]), 1000),
]


def damaged(payload: bytes, rng: random.Random) -> bytes:
    """Cuts, extensions, flipped bits, overwritten and repeated stretches."""
    data = bytearray(payload)
    kind = rng.randrange(6)
    place = rng.randrange(len(data))
    if kind == 0:
        del data[place:]
    elif kind == 1:
        data += rng.randbytes(rng.randint(1, 9))
    elif kind == 2:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        data[place : place + 8] = rng.randbytes(len(data[place : place + 8]))
    elif kind == 4:
        data = bytearray(rng.randbytes(len(data)))
    else:
        del data[place : place + rng.randint(1, 4)]
    return bytes(data)


@pytest.mark.parametrize(("codec", "mutations"), CASES, ids=lambda value: str(value)[:40])
def test_thirteen_thousand_mutations(codec, mutations):
    numel = NUMEL if codec.fixed_size else 8 * NUMEL
    payload = bytes(codec.encode(laplace(numel), seed=1).tolist())
    assert codec.fixed_size or payload[0] == 1  # really entropy-coded
    rng = random.Random(7)
    guarded = torch.full((numel + 64,), 7.0)
    refused = 0
    for _ in range(mutations):
        message = damaged(payload, rng)
        try:
            codec.decode(
                torch.frombuffer(bytearray(message or b"\0"), dtype=torch.uint8), numel, guarded[32:-32]
            )
        except ValueError:
            refused += 1
        assert (guarded[:32] == 7).all()
        assert (guarded[-32:] == 7).all()
    assert refused > mutations // 3
    intact = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
    assert codec.decode(intact, numel).isfinite().all()


@pytest.mark.parametrize("coding", ["packed", "huffman"])
def test_every_truncation_is_refused(coding):
    codec = NUQCodec(bits=2, coding=coding, bucket_size=512)
    payload = codec.encode(laplace(5000), seed=0)
    for length in range(0, payload.numel(), 7):
        with pytest.raises(ValueError, match="payload"):
            codec.decode(payload[:length], 5000)


@pytest.mark.parametrize("codec", [NUQCodec(), NUQCodec(coding="huffman"), IdentityCodec()], ids=repr)
@pytest.mark.parametrize(
    "payload",
    [
        torch.zeros(50),
        torch.zeros(50, dtype=torch.int8),
        torch.zeros(5, 10, dtype=torch.uint8),
        b"bytes",
        None,
    ],
    ids=["float", "int8", "matrix", "bytes", "none"],
)
def test_payload_of_the_wrong_type_is_refused(codec, payload):
    with pytest.raises(ValueError, match="payload must be"):
        codec.decode(payload, 50)


def test_negative_norm_and_bits_behind_the_end_are_refused():
    codec = NUQCodec(bits=3, bucket_size=8)
    payload = codec.encode(laplace(9), seed=0)
    negative, trailing = payload.clone(), payload.clone()
    negative[3] |= 128
    trailing[-1] |= 128
    for bad in (negative, trailing):
        with pytest.raises(ValueError, match="malformed"):
            codec.decode(bad, 9)


def test_message_of_another_codec_is_refused():
    payload = NUQCodec(bits=4).encode(laplace(5000), seed=0)
    with pytest.raises(ValueError, match="payload must have"):
        NUQCodec(bits=2).decode(payload, 5000)
