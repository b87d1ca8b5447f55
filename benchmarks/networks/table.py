"""What was found about the networks, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_COLUMNS = (
    "network",
    "quantized",
    "loss",
    "resumes",
    "integer, float",
    "batch",
    "codes moved",
    "outputs, same codes",
    "parity",
)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a row per network and a line of totals."""
    rows = [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
    rows += [_row(name, found) for name, found in results.items()]
    exact = sum(bool(found.get("resumed")) for found in results.values())
    fine = sum(_parity(found) == "yes" for found in results.values())
    falls = sum(_falls(found) for found in results.values())
    total = f"{len(results)} networks: the loss of {falls} falls, {exact} resume exactly, {fine} have parity"
    return "\n".join([*rows, "", total])


def _falls(found: Mapping[str, Any]) -> bool:
    return "loss_last" in found and found["loss_last"] < found["loss_first"]


def _parity(found: Mapping[str, Any]) -> str:
    """Returns whether codes at thresholds and roundings explain every difference, or the error."""
    if "modules" not in found or "file" not in found:
        return found.get("error", "-")
    return "yes" if found["file"]["explained"] and found["modules"]["explained"] else "NO"


def _row(name: str, found: Mapping[str, Any]) -> str:
    cells = [name, f"{found.get('quantized', '-')} of {found.get('layers', '-')}"]
    loss = f"{found['loss_first']:.3g} to {found['loss_last']:.3g}" if "loss_last" in found else "-"
    cells += [loss, {True: "exactly", False: "NO"}.get(found.get("resumed"), "-")]
    cells += [f"{found['integer']}, {len(found['float'])}" if "integer" in found else "-"]
    cells += [{True: "open", False: "fixed"}.get(found.get("open_batch"), "-")]
    if "modules" in found:
        moved = max(part["moved"] / max(part["codes"], 1) for part in (found["file"], found["modules"]))
        forced = max(part["forced"] for part in (found["file"], found["modules"]))
        cells += [f"{100 * moved:.2g} %", f"{forced:.1e}"]
    else:
        cells += ["-", "-"]
    return f"| {' | '.join([*cells, _parity(found)])} |"
