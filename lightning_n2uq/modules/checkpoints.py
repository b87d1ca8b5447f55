"""Read our checkpoints without Lightning's Trainer, and start one network from another's weights."""

from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_n2uq.backbones.pretrained import LoadReport, copy_matching
from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.quantizers import UniformGrid
from lightning_n2uq.quantizers.base import DataInitializedQuantizer


def read_checkpoint(path: str, argument: str = "path") -> dict[str, Any]:
    """Returns a checkpoint's tensors and plain values on the CPU; code in the file is never run.

    Args:
        path: The file, written by this package's training.
        argument: The user's name for the path, used in errors.

    Raises:
        ValueError: The file is missing, damaged, carries code, or is no checkpoint of this package.
    """
    checkpoint = read_file(path, argument)
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise ValueError(
            f"{argument}: {path!r} is not a checkpoint of this package, "
            "expected a dictionary with 'state_dict' and 'hyper_parameters'"
        )
    averaged = sorted(key for key in checkpoint if "ema" in str(key).lower().split("_"))
    if averaged:
        rank_zero_warn(f"{argument}: {path!r} also holds averaged weights ({', '.join(averaged)}): not used")
    return checkpoint


def _fitted_to_other_bits(model: nn.Module, arguments: dict[str, Any]) -> set[str]:
    """Returns entries of quantizers that fit a step to data, where the source has other bits.

    The grids of integer-only networks have 8 bits whatever the layers have, and are never among them.
    """
    return {
        f"{name}.{entry}"
        for name, module in model.named_modules()
        if isinstance(module, DataInitializedQuantizer) and not isinstance(module, UniformGrid)
        for entry in module.state_dict()
        if module.bits != arguments.get("weight_bits" if "weight_quantizer" in name else "activation_bits")
    }


def load_matching(model: nn.Module, path: str) -> LoadReport:
    """Copies every entry of a checkpoint whose name and shape fit `model`, and reports the rest.

    This is how a 2-bit network starts from a float or a 4-bit one: weights and normalisation fit, while
    per-level thresholds of another bit width do not and keep their initial values.

    Raises:
        ValueError: The file cannot be read or nothing in it fits.
    """
    checkpoint = read_checkpoint(path, "init_from")
    source = checkpoint["state_dict"]
    own = model.state_dict().keys()
    report = LoadReport(path, unused=[name for name in source if name not in own])
    refit = _fitted_to_other_bits(model, checkpoint["hyper_parameters"])
    return copy_matching(model, source, report, "init_from", refit=refit)
