"""How the activation quantizer's cost grows with the number of values, with bits, and with threads."""

from __future__ import annotations

import torch

from benchmarks.quantizers import BASE, candidates
from benchmarks.timing import summary, take_turns

SIZES = (2**12, 2**14, 2**16, 2**18, 2**20, 2**22, 2**24)
NAMES = ("lightning_n2uq", BASE, "memory traffic (copies)")


def run(device: torch.device, seconds: float, largest: int = SIZES[-1]) -> dict[str, object]:
    """Nanoseconds per value, forward and backward, along each of the three."""
    threads = torch.get_num_threads()
    by_size = {numel: _nanoseconds(numel, 2, device, seconds / 4) for numel in SIZES if numel <= largest}
    middle = min(2**21, largest)
    by_bits = {bits: _nanoseconds(middle, bits, device, seconds / 4) for bits in range(2, 9)}
    by_threads = {}
    try:
        for count in sorted({1, 2, threads}) if device.type == "cpu" else ():
            torch.set_num_threads(count)
            by_threads[count] = _nanoseconds(middle, 2, device, seconds / 4)
    finally:
        torch.set_num_threads(threads)
    for title, rows in (("values", by_size), ("bits", by_bits), ("threads", by_threads)):
        for key, row in rows.items():
            print(f"  {title} {key:>9}: " + ", ".join(f"{name} {ns:.2f} ns" for name, ns in row.items()))
    return {"numel": by_size, "bits": by_bits, "threads": by_threads, "fixed_numel": middle}


def _nanoseconds(numel: int, bits: int, device: torch.device, seconds: float) -> dict[str, float]:
    samples = take_turns(candidates((numel,), bits, device, peers=False), seconds, device)
    figures = summary(samples, BASE)
    return {name: round(1e6 * float(figures[name]["ms_min"]) / numel, 4) for name in NAMES}
