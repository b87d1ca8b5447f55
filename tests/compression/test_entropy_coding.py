"""Huffman-coded messages: lossless, shorter, close to the entropy."""

import importlib.util

import numpy as np
import pytest
import torch
from codec_cases import code_entropy, laplace

from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.compression.huffman import LONGEST, SEGMENT, HuffmanCoder, code_lengths, codewords
from lightning_n2uq.strategies import ExchangeConfig, NUQSGDStrategy


def packed_and_coded(numel, **arguments):
    x = laplace(numel, seed=numel) * 1e-3
    packed, coded = NUQCodec(**arguments), NUQCodec(coding="huffman", **arguments)
    return packed, packed.encode(x, seed=3), coded, coded.encode(x, seed=3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("numel", [0, 1, 5, 1000, 4 * SEGMENT - 1, 8 * SEGMENT + 3, 17 * SEGMENT + 5])
def test_lossless(bits, numel):
    packed, plain, coded, message = packed_and_coded(numel, bits=bits)
    assert torch.equal(coded.decode(message, numel), packed.decode(plain, numel))
    assert message.numel() <= coded.nbytes(numel) == plain.numel() + 1
    assert not coded.fixed_size


@pytest.mark.parametrize(
    "arguments",
    [{"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 8, "levels": "float"}, {"bits": 4, "levels": "uniform"}],
    ids=str,
)
def test_shorter_than_packed_and_near_the_entropy(arguments):
    numel = 1 << 19
    packed, plain, _, message = packed_and_coded(numel, **arguments)
    bits_sent = 8 * message.numel() / numel
    norms = 32 / packed.bucket_size
    floor = code_entropy(plain, packed.form, numel)
    assert message.numel() < 0.9 * plain.numel()
    assert floor + norms <= bits_sent + 0.01
    assert bits_sent <= floor + norms + 0.25


def test_mean_of_messages_of_different_sizes():
    coded, packed = NUQCodec(coding="huffman"), NUQCodec()
    gradients = [laplace(9000, seed=1), torch.zeros(9000), laplace(9000, seed=2) ** 3]
    messages = [coded.encode(x, seed) for seed, x in enumerate(gradients)]
    assert len({message.numel() for message in messages}) == 3
    expected = packed.decode_mean([packed.encode(x, seed) for seed, x in enumerate(gradients)], 9000)
    assert torch.equal(coded.decode_mean(messages, 9000), expected)


def test_incompressible_codes_are_sent_as_they_are():
    codec = NUQCodec(bits=8, levels="uniform", norm="linf", coding="huffman")
    x = torch.linspace(-1, 1, 4096)
    message = codec.encode(x, seed=0)
    assert message[0] == 0
    assert message.numel() == codec.nbytes(4096)


@pytest.mark.parametrize(
    "counts", [[5, 3, 1, 1], [1] * 256, [2**k for k in range(40)], [0, 7, 0, 0]], ids=len
)
def test_code_lengths_make_a_complete_code_of_limited_depth(counts):
    lengths = code_lengths(np.array(counts + [0] * (256 - len(counts))))
    assert lengths.max() <= LONGEST
    assert sum(2.0 ** -int(length) for length in lengths if length) == 1.0
    words = [format(int(w), f"0{n}b")[::-1] for w, n in zip(codewords(lengths), lengths, strict=True) if n]
    assert not any(a != b and b.startswith(a) for a in words for b in words)


def test_code_lengths_are_optimal_where_the_limit_does_not_bind():
    assert code_lengths(np.array([40, 30, 20, 10])).tolist() == [1, 2, 3, 3]


def test_missing_package_is_named(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else real(name))
    with pytest.raises(ValueError, match="needs numba"):
        NUQCodec(coding="huffman")


@pytest.mark.parametrize("build", [NUQCodec, ExchangeConfig, NUQSGDStrategy])
def test_the_removed_coding_is_refused_with_the_reason(build):
    with pytest.raises(
        ValueError, match=r"^coding must be one of packed, huffman, got 'ans'; 'ans' was removed"
    ):
        build(coding="ans")


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_bytes_do_not_depend_on_threads(threads):
    symbols = np.random.default_rng(0).geometric(0.2, 40 * SEGMENT).clip(max=255).astype(np.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = HuffmanCoder(256).compress(symbols)
    torch.set_num_threads(threads)
    try:
        data = HuffmanCoder(256).compress(symbols)
        assert np.array_equal(data, expected)
        assert np.array_equal(HuffmanCoder(256).expand(data, len(symbols)), symbols)
    finally:
        torch.set_num_threads(before)
