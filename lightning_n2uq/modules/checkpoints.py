"""Read our checkpoints without Lightning's Trainer, and start one network from another's weights."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.quantizers.base import DataInitializedQuantizer


def read_checkpoint(path: str, argument: str = "path") -> dict[str, Any]:
    """Loads a checkpoint's tensors and plain values on the CPU; code in the file is never run.

    Args:
        path: A file written by this package's training.
        argument: The user's name for the path, used in errors.

    Raises:
        ValueError: If the file is missing, damaged, carries code, or is not one of ours.
    """
    checkpoint = read_file(path, argument)
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ValueError(
            f"{argument}: {path!r} is not a checkpoint of this package, "
            "expected a dictionary with 'state_dict' and 'hyper_parameters'"
        )
    return checkpoint


@dataclass
class LoadReport:
    """What `load_matching` took over: names of the target's entries, and of the source's left over."""

    source: str
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line with counts, then every name that was not taken over."""
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [f"init_from {self.source}: {len(self.loaded)} of {total} entries loaded"]
        for title, names in (
            ("not in the file, keep their initial values", self.missing),
            ("other shape, keep their initial values", self.mismatched),
            ("in the file only, not used", self.unused),
        ):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names)}")
        return "\n".join(lines)


def _fitted_to_other_bits(model: nn.Module, arguments: dict[str, Any]) -> set[str]:
    """Entries of quantizers that fit a step to data, where the source has other bits: a step is no range."""
    return {
        f"{name}.{entry}"
        for name, module in model.named_modules()
        if isinstance(module, DataInitializedQuantizer)
        for entry in module.state_dict()
        if module.bits != arguments.get("weight_bits" if "weight_quantizer" in name else "activation_bits")
    }


def load_matching(model: nn.Module, path: str) -> LoadReport:
    """Copies every entry of a checkpoint whose name and shape fit `model`, and report the rest.

    This is how a 2-bit network starts from a float or a 4-bit one: weights and normalisation fit, while
    per-level thresholds of another bit width do not and keep their initial values.

    Raises:
        ValueError: If the file cannot be read or nothing in it fits.
    """
    checkpoint = read_checkpoint(path, "init_from")
    source = checkpoint["state_dict"]
    refit = _fitted_to_other_bits(model, checkpoint["hyper_parameters"])
    target = model.state_dict()
    report = LoadReport(path, unused=[name for name in source if name not in target])
    for name, value in target.items():
        if name not in source:
            report.missing.append(name)
        elif source[name].shape != value.shape:
            report.mismatched.append(f"{name} {tuple(source[name].shape)} -> {tuple(value.shape)}")
        elif name in refit:
            report.mismatched.append(f"{name} (fitted to another bit width)")
        else:
            report.loaded.append(name)
    if not report.loaded:
        raise ValueError(f"init_from: nothing in {path!r} fits this network")
    model.load_state_dict({name: source[name] for name in report.loaded}, strict=False)
    return report
