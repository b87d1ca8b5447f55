"""Metrics, numbers and durations in words."""

from __future__ import annotations

import re

STAGES = {"train": "training", "val": "validation", "test": "test"}
_SCORES = {
    "acc": "accuracy",
    "acc5": "top-5 accuracy",
    "loss": "loss",
    "miou": "mean intersection over union",
    "map": "mean average precision",
    "lr": "learning rate",
}
_FAMILIES = {
    "quant/mean_weight_entropy": "mean weight entropy [bits]",
    "quant/mean_activation_entropy": "mean activation entropy [bits]",
    "quant/mean_weight_changed": "weights that changed level",
    "quant/total_weight_dead_levels": "dead weight levels",
    "quant/total_activation_dead_levels": "dead activation levels",
    "quant/total_widths_at_floor": "widths at the floor",
    "entropy/mean_weight": "regularized weight entropy [bits]",
    "entropy/mean_activation": "regularized activation entropy [bits]",
    "entropy/penalty": "penalty on low entropy",
    "comm/sent_bytes": "bytes sent per step",
    "comm/ratio": "compression ratio",
    "comm/encode_s": "seconds of encoding per step",
    "comm/exchange_s": "seconds of exchange per step",
    "comm/decode_s": "seconds of decoding per step",
    "comm/sync_s": "seconds of synchronization",
    "comm/nonfinite_buckets": "buckets that are not finite",
    "comm/relative_error": "relative squared error of the gradients",
}
_SHARE = re.compile(r"(?:\w+/)?acc\d*|.*(?:miou|weight_changed)")
_RISING = ("acc", "entropy", "ratio", "miou", "map")


def in_words(metric: str) -> str:
    """Returns what a metric's name means, without a capital letter."""
    if metric in _FAMILIES:
        return _FAMILIES[metric]
    if metric.startswith("lr-"):
        return f"learning rate ({metric[3:].replace('/', ', ')})"
    stage, _, score = metric.rpartition("/")
    words = _SCORES.get(score, score.replace("_", " "))
    return f"{STAGES.get(stage, stage)} {words}".strip()


def sentence(text: str) -> str:
    """Returns the text with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def is_share(metric: str) -> bool:
    """Returns whether a metric is a share of 1, which is shown in percent."""
    return _SHARE.fullmatch(metric) is not None


def is_better_high(metric: str) -> bool:
    """Returns whether higher values of a metric are better."""
    return any(word in metric for word in _RISING)


def number(metric: str, value: float | None) -> str:
    """Returns a metric's value as text."""
    if value is None:
        return "-"
    if value != value:
        return "not a number"
    return f"{100 * value:.2f}%" if is_share(metric) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds, the two largest units."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.3g} s"


def size(count: float) -> str:
    """Returns bytes in the unit that fits."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:g} bytes"
