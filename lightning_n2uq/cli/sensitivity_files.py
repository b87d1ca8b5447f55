"""Files of `n2uq sensitivity`: the policy, a config that trains by it, and a picture."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_n2uq.convert import Allocation, Policy, Rule, Sensitivity
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.utils.extras import how_to_install

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_n2uq.cli.sensitivity_subject import Subject

_FIELDS = ("weight_bits", "activation_bits", "weight_quantizer", "activation_quantizer")


def compact(policy: Policy) -> dict[str, Any]:
    """Returns plain values of a policy without those that are defaults anyway."""
    defaults = {field.name: field.default for field in fields(Rule)}
    values = policy.to_mapping()
    rules = [{k: v for k, v in rule.items() if v != defaults[k]} for rule in values.pop("rules")]
    kept = {
        k: v for k, v in values.items() if k in _FIELDS or (v and v != getattr(Policy(), k)) or v is False
    }
    return {**kept, "rules": rules}


def write_policy(folder: Path, chosen: Allocation, subject: Subject, command: str) -> list[str]:
    """Writes `policy.yaml` and, where a config can add it, `mixed_bits.yaml`; returns what to say.

    Args:
        folder: Where to write.
        chosen: The widths.
        subject: What was scored.
        command: The command that trains by the config as it is.
    """
    values = compact(chosen.to_policy())
    head = f"# Bits by n2uq sensitivity: {chosen.budget}, least sum of {chosen.by}.\n"
    policy = folder / "policy.yaml"
    policy.write_text(head + _text(values), encoding="utf-8")
    if subject.quantizing is not None:
        return [f"policy: {policy}", f"train by it with `policy: {policy}` in the config's QuantizeModel"]
    config = folder / "mixed_bits.yaml"
    command = f"{command} --config {config}"
    if isinstance(subject.built.model, QuantizedClassifier):
        section = _classifier(subject.built.config.model, values)
    else:
        callback = {"class_path": "QuantizeModel", "init_args": {"policy": values}}
        section = {"trainer": {"callbacks+": [callback]}}
    if (path := subject.built.config.get("ckpt_path")) and isinstance(
        subject.built.model, QuantizedClassifier
    ):
        command += f" --model.init_from {path}"
    config.write_text(f"{head}#   {command}\n{_text(section)}", encoding="utf-8")
    return [f"policy: {policy}", f"train by it: {command}"]


def _classifier(model: Any, policy: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 -- a namespace
    """Returns the section that gives a classifier's backbone the policy, beside its other arguments."""
    arguments = {**dict(model.init_args.get("backbone_args") or {}), "policy": policy}
    values = {key: policy[key] for key in _FIELDS}
    return {"model": {"class_path": model.class_path, "init_args": {**values, "backbone_args": arguments}}}


def _text(values: Any) -> str:  # noqa: ANN401
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)
    return text


def write_picture(path: Path, scores: Sensitivity, by: str | None, chosen: Allocation | None) -> str:
    """Draws the scores as a map of layers and widths; returns what to say."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"picture: none, matplotlib is not installed ({how_to_install('figures')})"
    draw(scores, by or scores.measures[0], chosen).savefig(path)
    return f"picture: {path}"


def draw(scores: Sensitivity, by: str, chosen: Allocation | None) -> Figure:
    """Returns a figure: a row per layer, a column per width, logarithms as colors; chosen ones are framed."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    layers, widths = scores.layers, scores.widths
    figure = Figure(figsize=(3 + 0.6 * len(widths), 1 + 0.22 * len(layers)), layout="constrained", dpi=150)
    axes = figure.subplots()
    values = [[abs(getattr(layer, by)[bits]) for bits in widths] for layer in layers]
    rows = [[math.log10(max(x, 1e-9)) if math.isfinite(x) else math.nan for x in row] for row in values]
    image = axes.imshow(rows, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize="x-small")
    axes.set(xlabel="bits")
    name = "KL divergence" if by == "kl" else "|change of loss|"
    figure.colorbar(image, label=f"log10 {name}")
    for row, layer in enumerate(layers if chosen is not None else []):
        column = widths.index(chosen.widths[layer.name])  # type: ignore[union-attr]
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.5))
    return figure
