"""How large the parts of an exported network are."""

from __future__ import annotations

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Affine, Codes, FixedLinear, IntConv, PReLU, SplitConv, Step


def float_bytes(description: Description) -> int:
    """Bytes of the same network's parameters in float32: weights, and two numbers per norm channel."""
    return sum(4 * _parameters(step) for step in description.steps)


def _parameters(step: Step) -> int:
    if isinstance(step, SplitConv):
        return step.high.size
    if isinstance(step, IntConv | FixedLinear):
        return step.weight.size
    if isinstance(step, Affine | PReLU):
        return sum(array.size for array in step.arrays().values())
    return 0


def size_report(description: Description, file_bytes: int) -> str:
    """Bytes by kind of content, and the file's share of a float32 file, as text."""
    weights = sum(-(-s.weight.size * s.bits // 8) for s in description.steps if isinstance(s, IntConv))
    thresholds = sum(s.thresholds.nbytes for s in description.steps if isinstance(s, Codes))
    floats = sum(
        4 * _parameters(step) * (2 if isinstance(step, SplitConv) else 1)
        for step in description.steps
        if not isinstance(step, IntConv)
    )
    total = float_bytes(description)
    parts = (
        ("integer weights, packed", weights),
        ("thresholds", thresholds),
        ("layers and scales in full precision", floats),
        ("graph and names", max(file_bytes - weights - thresholds - floats, 0)),
        ("file", file_bytes),
        ("parameters in float32", total),
    )
    lines = [f"{name:<37}{size:>12,} bytes" for name, size in parts]
    lines.append(f"file / float32: {file_bytes / max(total, 1):.3f}")
    return "\n".join(lines)
