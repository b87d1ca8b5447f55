"""A message in which some parameters travel in full precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_n2uq.compression.base import (
    Codec,
    check_gradient,
    check_payload,
    gradient_buffer,
    message_buffer,
)
from lightning_n2uq.compression.identity import IdentityCodec

Segment = tuple[int, int]  # (offset, numel) in a flat gradient


class SkipCodec(Codec):
    """Sends given segments of a flat gradient as fp32 and the rest by another codec, in one message.

    Which segments (one-dimensional parameters, small tensors, name patterns) is the caller's decision. The
    message is the segments' fp32 bytes, in order of offset, followed by the inner codec's message of the
    remaining coordinates joined together.

    Args:
        codec: The codec of the coordinates outside the segments.
        segments: The `(offset, numel)` pairs, in any order; they must not overlap.

    Raises:
        ValueError: If segments overlap, or an offset or length is negative.
    """

    def __init__(self, codec: Codec, segments: Sequence[Segment]) -> None:
        self.codec = codec
        self.segments = _normalized(segments)
        self.skipped = sum(numel for _, numel in self.segments)
        self.fixed_size = codec.fixed_size

    def nbytes(self, numel: int) -> int:
        """Returns four bytes per skipped coordinate plus the inner message."""
        self._check_numel(numel)
        return 4 * self.skipped + self.codec.nbytes(numel - self.skipped)

    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Writes the segments, then the inner message; see `Codec.encode`."""
        x = check_gradient(x)
        message = message_buffer(out, self.nbytes(x.numel()), x.device)
        start = 4 * self.skipped
        if self.segments:
            exact = torch.cat([x[offset : offset + numel] for offset, numel in self.segments])
            message[:start].copy_(exact.view(torch.uint8))
        rest = torch.cat([x[a:b] for a, b in self._gaps(x.numel())])
        inner = self.codec.encode(rest, seed, message[start:])
        return message[: start + inner.numel()]

    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Puts both parts back in place; see `Codec.decode`."""
        return self.decode_mean([payload], numel, out)

    def decode_mean(
        self, payloads: Sequence[Tensor] | Tensor, numel: int, out: Tensor | None = None
    ) -> Tensor:
        """Averages the exact parts and the inner messages; see `Codec.decode_mean`."""
        if len(payloads) == 0:
            raise ValueError("payloads must hold at least one message, got none.")
        self._check_numel(numel)
        start = 4 * self.skipped
        messages = [self._checked(payload, numel) for payload in payloads]
        result = gradient_buffer(out, numel, messages[0].device)
        exact = IdentityCodec().decode_mean([message[:start] for message in messages], self.skipped)
        rest = self.codec.decode_mean([message[start:] for message in messages], numel - self.skipped)
        _scatter(exact, result, [(a, a + n) for a, n in self.segments])
        _scatter(rest, result, self._gaps(numel))
        return result

    def variance_bound(self) -> float:
        """Returns the bound of the inner codec; skipped coordinates add nothing."""
        return self.codec.variance_bound()

    def describe(self) -> str:
        """Returns the inner codec and the segments in one line."""
        return f"skip({self.codec.describe()}, {list(self.segments)})"

    def _checked(self, payload: Tensor, numel: int) -> Tensor:
        payload = check_payload(payload, numel)
        if payload.numel() < 4 * self.skipped:
            raise ValueError(
                f"payload must start with {4 * self.skipped} bytes of skipped coordinates, "
                f"got {payload.numel()} bytes."
            )
        return payload

    def _check_numel(self, numel: int) -> None:
        end = sum(self.segments[-1]) if self.segments else 0
        if numel < end:
            raise ValueError(
                f"numel must be at least {end}, the end of the last skipped segment, got {numel}."
            )

    def _gaps(self, numel: int) -> list[tuple[int, int]]:
        """Returns the `(start, stop)` ranges outside the segments; one empty range if there are none."""
        starts = [0, *(offset + length for offset, length in self.segments)]
        stops = [*(offset for offset, _ in self.segments), numel]
        return [(a, b) for a, b in zip(starts, stops, strict=True) if b > a] or [(0, 0)]


def _normalized(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Returns the segments sorted, without empty ones, and with touching ones joined."""
    merged: list[Segment] = []
    for offset, numel in sorted((int(a), int(n)) for a, n in segments):
        end = sum(merged[-1]) if merged else 0
        if offset < 0 or numel < 0 or (numel and offset < end):
            raise ValueError(f"segments must be disjoint with offset, numel >= 0, got {list(segments)!r}.")
        if not numel:
            continue
        if merged and offset == end:
            merged[-1] = (merged[-1][0], merged[-1][1] + numel)
        else:
            merged.append((offset, numel))
    return tuple(merged)


def _scatter(source: Tensor, target: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    position = 0
    for start, stop in ranges:
        target[start:stop].copy_(source[position : position + stop - start])
        position += stop - start
