"""What deployed quantizers see: recorded while a network runs, or replaced by codes from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Trace:
    """What each quantizer was given and gave, in the order of its calls.

    Attributes:
        inputs: Values in front of each call, by the call's name.
        codes: What they became.
        forced: Codes by call that are used instead, whatever the values are.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    forced: Mapping[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        """Keeps one call, and returns the codes that the network goes on with."""
        call, count = name, 1
        while call in self.codes:  # a layer that is called again
            count += 1
            call = f"{name}#{count}"
        self.inputs[call], self.codes[call] = x, codes
        return self.forced.get(call, codes)


_open: list[Trace] = []


@contextmanager
def tracing(forced: Mapping[str, Tensor] | None = None) -> Iterator[Trace]:
    """Records every quantizer's call inside; with `forced`, its codes are replaced."""
    trace = Trace(forced=forced or {})
    _open.append(trace)
    try:
        yield trace
    finally:
        _open.remove(trace)


def seen(name: str, x: Tensor, codes: Tensor) -> Tensor:
    """Tells the innermost open trace of a call, and returns the codes to go on with."""
    return _open[-1].note(name, x, codes) if _open else codes
