"""How large the parts of an exported network are."""

from __future__ import annotations

from lightning_n2uq.export.ir.description import Description
from lightning_n2uq.export.ir.steps import Affine, Codes, FixedLinear, IntConv, PReLU, SplitConv, Step


def float_bytes(description: Description) -> int:
    """Returns the bytes of the network's parameters in float32: weights, and two numbers per norm channel."""
    return sum(4 * _parameters(step) for step in description.steps)


def _parameters(step: Step) -> int:
    if isinstance(step, SplitConv):
        return step.high.size
    if isinstance(step, IntConv | FixedLinear | Affine | PReLU):
        return sum(array.size for array in step.arrays().values())
    return 0


def size_report(description: Description, file_bytes: int) -> str:
    """Returns the bytes by kind of content, and the file's share of a float32 file, as text."""
    steps, total = description.steps, float_bytes(description)
    weights = sum(-(-s.weight.size * s.bits // 8) for s in steps if isinstance(s, IntConv))
    thresholds = sum(s.thresholds.nbytes for s in steps if isinstance(s, Codes))
    # A convolution in full precision is stored as two arrays.
    floats = sum(
        4 * _parameters(s) * (1 + isinstance(s, SplitConv)) for s in steps if not isinstance(s, IntConv)
    )
    parts = {
        "integer weights, packed": weights,
        "thresholds": thresholds,
        "layers and scales in full precision": floats,
        "graph and names": max(file_bytes - weights - thresholds - floats, 0),
        "file": file_bytes,
        "parameters in float32": total,
    }
    lines = [f"{name:<37}{size:>12,} bytes" for name, size in parts.items()]
    return "\n".join([*lines, f"file / float32: {file_bytes / max(total, 1):.3f}"])
