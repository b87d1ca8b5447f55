"""The headline of every run: what was trained, how large it is, and how well it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from lightning_n2uq.report.run_data import Run, Series
from lightning_n2uq.report.tables import table
from lightning_n2uq.report.words import duration, in_words, number, sentence, size

_MODEL = "model.init_args."
_NONE = "-"
_FLOAT = 32


def facts_table(runs: Sequence[Run]) -> Markup:
    """Returns a column per run and a row per fact; facts that no run tells are left out."""
    columns = [_facts(run) for run in runs]
    tests = dict.fromkeys(name for run in runs for name in run.metrics if name.startswith("test/"))
    for column, run in zip(columns, runs, strict=True):
        for name in tests:
            value = run.metrics[name].last if name in run.metrics else None
            column[sentence(in_words(name))] = number(name, value)
    rows = [[fact, *(column[fact] for column in columns)] for fact in columns[0]]
    shown = [row for row in rows if any(cell != _NONE for cell in row[1:])]
    return table("What was trained, and how well it does", ["", *(run.name for run in runs)], shown)


def _facts(run: Run) -> dict[str, str]:
    return {fact: say(run, run.record, run.settings) or _NONE for fact, say in _FACTS.items()}


Say = Callable[[Run, dict[str, Any], dict[str, Any]], "str | None"]


def _network(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    kind = str(settings.get("model.class_path", "")).rpartition(".")[2]
    backbone = settings.get(f"{_MODEL}backbone") or settings.get(f"{_MODEL}network")
    return f"{backbone} ({kind})" if backbone else kind or None


def _method(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    pairs = [(kind["weight_method"], kind["activation_method"]) for kind in record.get("layers") or []]
    if not pairs:  # what the config asks for
        names = [settings.get(f"{_MODEL}{side}_quantizer") for side in ("weight", "activation")]
        pairs = [(str(names[0]), str(names[1]))] if all(names) else []
    quantized = dict.fromkeys(pair for pair in pairs if set(pair) != {"float"})
    return "; ".join(w if w == a else f"{w} weights, {a} activations" for w, a in quantized or pairs) or None


def _bits(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """Returns the bits of the layers, as counted in the network, or those that the config asks for."""
    kinds = record.get("layers") or []
    if not kinds:
        weights, activations = (settings.get(f"{_MODEL}{side}_bits") for side in ("weight", "activation"))
        return _short(weights, activations) if weights and activations else None
    counts: Counter[str] = Counter()
    for kind in kinds:
        counts[_short(kind["weight_bits"], kind["activation_bits"])] += kind["count"]
    return "; ".join(f"{bits}: {count} layer{'s' * (count != 1)}" for bits, count in counts.most_common())


def _short(weights: int, activations: int) -> str:
    return "float" if weights == activations == _FLOAT else f"W{weights}A{activations}"


def _parameters(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    return f"{record['parameters']:,}" if "parameters" in record else None


def _size(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    if not record.get("float_bytes"):
        return None
    packed, full = record["packed_bytes"], record["float_bytes"]
    return f"{size(packed)}, {100 * packed / full:.1f}% of {size(full)} in float32"


def _data(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    kind = record.get("data") or str(settings.get("data.class_path", "")).rpartition(".")[2]
    root = record.get("root") or settings.get("data.init_args.root")
    samples = record.get("samples") or {}
    counts = ", ".join(f"{count:,} {split}" for split, count in samples.items())
    return ", ".join(str(part) for part in (kind, root, counts) if part) or None


def _classes(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    count = record.get("num_classes") or len(run.class_names)
    names = ", ".join(run.class_names[:10]) + (", ..." if len(run.class_names) > 10 else "")
    return f"{count}: {names}" if names else str(count) if count else None


def _seed(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    seed = settings.get("seed_everything")
    return None if seed is None else str(seed)


def _epochs(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    return f"{max(run.epochs.values()) + 1}, {max(run.epochs) + 1:,} steps" if run.epochs else None


def _duration(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    ranks = record.get("ranks", 1)
    if "seconds" not in record:
        return None
    return duration(record["seconds"]) + (f" on {ranks} devices" if ranks > 1 else "")


def _revision(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    revision = record.get("revision", "unknown")
    version = record.get("version")
    return f"{version} ({revision})" if version and revision != "unknown" else version


def _best(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    series = run.metrics.get("val/acc")
    if series is None or not (finite := [v for v in series.values if v == v]):
        return None
    step = series.steps[series.values.index(max(finite))]
    return number("val/acc", max(finite)) + f" ({_when(run, step)})"


def _last(run: Run, record: dict[str, Any], settings: dict[str, Any]) -> str | None:
    series: Series | None = run.metrics.get("val/acc")
    return None if series is None else number("val/acc", series.last)


def _when(run: Run, step: int) -> str:
    return f"epoch {run.epochs[step] + 1}, step {step}" if step in run.epochs else f"step {step}"


_FACTS: dict[str, Say] = {
    "Network": _network,
    "Method": _method,
    "Bits": _bits,
    "Parameters": _parameters,
    "Size, packed": _size,
    "Data": _data,
    "Classes": _classes,
    "Seed": _seed,
    "Epochs": _epochs,
    "Training took": _duration,
    "Version": _revision,
    "Best validation accuracy": _best,
    "Last validation accuracy": _last,
}
