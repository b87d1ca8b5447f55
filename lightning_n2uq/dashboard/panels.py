"""What the dashboard shows: sections of panels, each panel a regular expression over metric names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PanelSpec:
    """A line plot of all metrics whose whole name matches.

    Attributes:
        title: The panel's heading.
        regex: A pattern of the whole name of a metric.
        log_y: Whether the vertical axis is logarithmic.
    """

    title: str
    regex: str
    log_y: bool = False


@dataclass(frozen=True)
class SectionSpec:
    """A section; the first of the workspace are open.

    Attributes:
        title: The section's heading.
        panels: The line plots.
        images: The names of images to browse beside them.
    """

    title: str
    panels: tuple[PanelSpec, ...]
    images: tuple[str, ...] = ()


SECTIONS = (
    SectionSpec(
        "Accuracy",
        (
            PanelSpec("Accuracy", "(train|val|test)/acc"),
            PanelSpec("Loss", "(train|val|test)/loss", log_y=True),
            PanelSpec("Learning rate", "lr-.*"),
        ),
    ),
    SectionSpec(
        "Thresholds",
        (
            PanelSpec("Thresholds", r"quant/.*/threshold_\d+"),
            PanelSpec("Smallest width", "quant/.*/smallest_width"),
            PanelSpec("Widths at the floor", "quant/.*/widths_at_floor"),
            PanelSpec("Scales", "quant/.*/scale_(in|out)"),
            PanelSpec("Clipped inputs", "quant/.*/activation_clipped_(low|high)"),
            PanelSpec("Weights that changed level", "quant/.*/weight_changed"),
        ),
    ),
    SectionSpec(
        "Entropy",
        (
            PanelSpec("Entropy of weights [bits]", "quant/.*/weight_entropy"),
            PanelSpec("Entropy of activations [bits]", "quant/.*/activation_entropy"),
            PanelSpec("Means over layers", "(quant|entropy)/mean_.*"),
            PanelSpec("Dead levels", "quant/.*/(weight|activation)_dead_levels"),
            PanelSpec("Level usage of weights", r"quant/.*/weight_usage_\d+"),
            PanelSpec("Level usage of activations", r"quant/.*/activation_usage_\d+"),
            PanelSpec("Penalty", "entropy/penalty"),
        ),
        ("quant/usage", "quant/entropy"),
    ),
    SectionSpec(
        "Traffic",
        (
            PanelSpec("Bytes per step", "comm/sent_bytes", log_y=True),
            PanelSpec("Compression ratio", "comm/ratio"),
            PanelSpec("Relative error", "comm/relative_error", log_y=True),
            PanelSpec("Non-finite buckets", "comm/nonfinite_buckets"),
        ),
    ),
    SectionSpec(
        "Speed",
        (
            PanelSpec("Time of the exchange [s]", "comm/(encode|exchange|decode|sync)_s"),
            PanelSpec("Optimizer steps per second", "speed/steps_per_second"),
        ),
    ),
)
"""The workspace, from top to bottom."""
