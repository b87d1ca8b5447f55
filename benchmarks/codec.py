"""The gradient codec: encode and decode rates in bytes of fp32 gradients, against eager torch and a copy.

The exchange reuses its buffers, so that is what `encode` and `decode` do here. A new tensor of this size
costs page faults, more than the codec itself: `clone` shows them without any codec.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.compression import MessageSeed, NUQCodec
from lightning_n2uq.ops.dispatch import force

NUMEL = 11_689_512  # gradients of ResNet-18
BASE = "copy"


def run(device: torch.device, seconds: float, numel: int = NUMEL) -> dict[str, object]:
    """Encode and decode of 4-bit codes in buckets of 1024; prints gigabytes per second."""
    x = torch.randn(numel, device=device)
    codec = NUQCodec(bits=4, bucket_size=1024)
    payload = codec.encode(x, seed=0)
    target, message = torch.empty_like(x), torch.empty_like(payload)

    def eager(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with force("reference"):
                return call()

        return run

    def encode() -> object:
        return codec.encode(x, seed=0, out=message)

    def decode() -> object:
        return codec.decode(payload, numel, out=target)

    messages = torch.stack([payload] * 4)
    calls = {
        BASE: lambda: target.copy_(x),
        "encode": encode,
        "decode": decode,
        "decode and average 4 messages": lambda: codec.decode_mean(messages, numel, out=target),
        **rotated_calls(x, target),
        "decode to a new tensor": lambda: codec.decode(payload, numel),
        "copy to a new tensor (clone)": x.clone,
        "fp16 cast (torch's fp16 hook)": lambda: x.half(),
        "encode, eager torch": eager(encode),
        "decode, eager torch": eager(decode),
    }
    figures = summary(take_turns(calls, seconds, device), BASE)
    for row in figures.values():
        row["gigabytes_per_second"] = round(4e-6 * numel / float(row["ms_median"]), 3)
    print(table(f"codec, {numel} fp32 gradients, 4 bits, buckets of 1024", figures))
    for name, row in figures.items():
        print(f"  {name:<50} {row['gigabytes_per_second']} GB/s")
    return {"numel": numel, **figures}


def rotated_calls(x: torch.Tensor, target: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Rotated codecs: encode, and decode and average the messages of 4 ranks, as the exchange does."""
    calls: dict[str, Callable[[], object]] = {}
    for name, bits, rounding in (("4 bits", 4, "stochastic"), ("2 bits, eden", 2, "eden")):
        codec = NUQCodec(bits, rotation="hadamard", rounding=rounding)
        rows = torch.stack([codec.encode(x, MessageSeed(rank, 0)) for rank in range(4)])
        message = torch.empty_like(rows[0])
        calls[f"encode, rotated, {name}"] = functools.partial(codec.encode, x, 0, message)
        calls[f"decode and average 4 messages, rotated, {name}"] = functools.partial(
            codec.decode_mean, rows, x.numel(), target
        )
    return calls
