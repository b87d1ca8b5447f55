"""The contract of a gradient codec, and the checks that every codec shares."""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor


class Codec(abc.ABC):
    """Turns a flat fp32 gradient into bytes and back.

    A codec holds parameters only, no state: the same arguments give the same bytes. Codecs are adapted by
    wrapping (`SkipCodec`, `ErrorFeedback`), not by flags.

    Attributes:
        fixed_size: Whether every message of `n` coordinates has exactly `nbytes(n)` bytes; otherwise
            `nbytes(n)` is an upper bound.
    """

    fixed_size: bool = True

    @abc.abstractmethod
    def nbytes(self, numel: int) -> int:
        """Returns the bytes of a message of `numel` coordinates, an upper bound if not `fixed_size`."""

    @abc.abstractmethod
    def encode(self, x: Tensor, seed: int, out: Tensor | None = None) -> Tensor:
        """Encodes a gradient.

        Args:
            x: A 1-D fp32 tensor on any device.
            seed: The seed of the stochastic rounding: any integer, of which 64 bits count.
            out: A 1-D contiguous uint8 buffer on the same device, of at least `nbytes(x.numel())` bytes;
                None allocates one.

        Returns:
            The message, a 1-D uint8 tensor: the front of `out` where that was given.

        Raises:
            ValueError: If an argument has the wrong type, shape or size.
        """

    @abc.abstractmethod
    def decode(self, payload: Tensor, numel: int, out: Tensor | None = None) -> Tensor:
        """Decodes one message.

        Args:
            payload: The whole message and nothing else, a 1-D uint8 tensor.
            numel: The number of coordinates that were encoded.
            out: A 1-D contiguous fp32 tensor `[numel]` to overwrite; None allocates one.

        Returns:
            fp32 tensor `[numel]`.

        Raises:
            ValueError: If the payload is not a message of `numel` coordinates.
        """

    def decode_mean(
        self, payloads: Sequence[Tensor] | Tensor, numel: int, out: Tensor | None = None
    ) -> Tensor:
        """Decodes `W` messages and averages them: an fp32 sum in the order given, divided by `W`.

        Args:
            payloads: The `W` messages, or a uint8 tensor `[W, nbytes]`.
            numel: The number of coordinates of each message.
            out: The tensor to overwrite, as in `decode`.

        Returns:
            fp32 tensor `[numel]`; the same bits wherever the same messages are given in the same order.

        Raises:
            ValueError: If there is no message, or one is malformed.
        """
        if len(payloads) == 0:
            raise ValueError("payloads must hold at least one message, got none.")
        total = self.decode(payloads[0], numel, out)
        scratch = torch.empty_like(total) if len(payloads) > 1 else None
        for payload in payloads[1:]:
            total += self.decode(payload, numel, scratch)
        return total.div_(len(payloads))

    def check_message(self, payload: Tensor, numel: int) -> Tensor:
        """Returns `payload` contiguous, or raises ValueError unless it can be a message of a fixed size."""
        payload = check_payload(payload, numel)
        check_size(payload, self.nbytes(numel), numel)
        return payload

    @abc.abstractmethod
    def variance_bound(self) -> float:
        """Returns an upper bound `e` of `E||decode(encode(v)) - v||^2 <= e ||v||^2`."""

    @abc.abstractmethod
    def describe(self) -> str:
        """Returns all parameters in one line; two codecs understand each other iff the lines are equal."""

    def __repr__(self) -> str:
        return self.describe()


def check_gradient(x: Tensor) -> Tensor:
    """Returns `x` contiguous and detached, or raises ValueError unless it is a dense 1-D fp32 tensor."""
    if not _is_dense(x) or x.dtype != torch.float32 or x.dim() != 1:
        raise ValueError(f"x must be a dense 1-D float32 tensor, got {_what(x)}.")
    return x.detach().contiguous()


def check_payload(payload: Tensor, numel: int) -> Tensor:
    """Returns `payload` contiguous, or raises ValueError unless it is 1-D uint8 and `numel` is a count."""
    if not isinstance(numel, int) or isinstance(numel, bool) or numel < 0:
        raise ValueError(f"numel must be a non-negative integer, got {numel!r}.")
    if not _is_dense(payload) or payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ValueError(f"payload must be a dense 1-D uint8 tensor, got {_what(payload)}.")
    return payload.contiguous()


def check_size(payload: Tensor, nbytes: int, numel: int) -> None:
    """Raises ValueError unless a message of `numel` coordinates has `nbytes` bytes."""
    if payload.numel() != nbytes:
        raise ValueError(f"payload must have {nbytes} bytes for {numel} coordinates, got {payload.numel()}.")


def message_buffer(out: Tensor | None, nbytes: int, device: torch.device) -> Tensor:
    """Returns the first `nbytes` of `out`, or a new uint8 tensor of that size.

    Raises:
        ValueError: If `out` is no contiguous 1-D uint8 tensor of at least `nbytes` on `device`.
    """
    if out is None:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    usable = _is_dense(out) and out.dtype == torch.uint8 and out.dim() == 1 and out.is_contiguous()
    if not usable or out.numel() < nbytes or out.device != device:
        raise ValueError(
            f"out must be a contiguous 1-D uint8 tensor of at least {nbytes} bytes on {device}, "
            f"got {_what(out)}."
        )
    return out[:nbytes]


def gradient_buffer(out: Tensor | None, numel: int, device: torch.device) -> Tensor:
    """Returns `out`, or a new fp32 tensor `[numel]`.

    Raises:
        ValueError: If `out` is no contiguous fp32 tensor `[numel]` on `device`.
    """
    if out is None:
        return torch.empty(numel, dtype=torch.float32, device=device)
    usable = _is_dense(out) and out.dtype == torch.float32 and out.is_contiguous()
    if not usable or out.shape != (numel,) or out.device != device:
        raise ValueError(f"out must be a contiguous float32 tensor [{numel}] on {device}, got {_what(out)}.")
    return out


def _is_dense(x: object) -> bool:
    """Returns whether `x` is a tensor with values in memory: neither sparse nor on the meta device."""
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta


def _what(value: object) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{value.layout} "
        return f"{layout}{value.dtype} {list(value.shape)} on {value.device}"
    return repr(value)
