"""What deployed quantizers see, and what detectors decide: recorded while a network runs, or replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Trace:
    """What each quantizer was given and gave, in the order of its calls.

    Attributes:
        inputs: Values in front of each call, by the call's name.
        codes: What they became.
        choices: What was decided, such as which boxes are kept, by the call's name.
        margins: By how much a choice from elsewhere is off by this network's values, relative to the largest.
        forced: Codes and choices by call that are used instead, whatever the values are.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Tensor] = field(default_factory=dict)
    choices: dict[str, Tensor] = field(default_factory=dict)
    margins: dict[str, float] = field(default_factory=dict)
    forced: Mapping[str, Tensor] = field(default_factory=dict)

    def note(self, name: str, x: Tensor, codes: Tensor) -> Tensor:
        """Keeps one call, and returns the codes that the network goes on with."""
        call = _call(name, self.codes)
        self.inputs[call], self.codes[call] = x, codes
        return self.forced.get(call, codes)

    def choose(self, kind: str, own: Tensor, margin: Callable[[Tensor], float]) -> Tensor:
        """Keeps one decision, and returns the one that the network goes on with."""
        call = _call(f"detections: {kind}", self.choices)
        self.choices[call] = own
        if call not in self.forced:
            return own
        self.margins[call] = margin(self.forced[call])
        return self.forced[call]


def _call(name: str, known: Mapping[str, Tensor]) -> str:
    """Returns a name for what may be called again."""
    call, count = name, 1
    while call in known:
        count += 1
        call = f"{name}#{count}"
    return call


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


def chosen(kind: str, own: Tensor, margin: Callable[[Tensor], float]) -> Tensor:
    """Tells the innermost open trace of a decision, and returns the one to go on with.

    Args:
        kind: What is decided.
        own: What this network's values decide.
        margin: Gives how far another decision is off.
    """
    return _open[-1].choose(kind, own, margin) if _open else own
