"""Read our checkpoints without Lightning's Trainer, and start one network from another's weights."""

from collections.abc import Mapping
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_n2uq.backbones.pretrained import LoadReport, load_entries
from lightning_n2uq.checkpointing.reading import read_file
from lightning_n2uq.quantizers import UniformGrid
from lightning_n2uq.quantizers.base import DataInitializedQuantizer
from lightning_n2uq.utils.state_dicts import KEYS, averaged_keys, find_state_dict, named_like


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
    _name_averaged(checkpoint, path, argument)
    checkpoint["state_dict"] = named_like(checkpoint["state_dict"], {})
    return checkpoint


def _name_averaged(content: Mapping[str, Any], path: str, argument: str) -> None:
    averaged = averaged_keys(content)
    if averaged and any(key in content for key in KEYS):
        rank_zero_warn(f"{argument}: {path!r} also holds averaged weights ({', '.join(averaged)}): not used")


def _fitted_to_other_bits(model: nn.Module, arguments: Mapping[str, Any]) -> set[str]:
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
    per-level thresholds of another bit width do not and keep their initial values. The file may come from
    elsewhere: a state dict, bare or under one of `lightning_n2uq.utils.state_dicts.KEYS`, with wrappers in
    front of its names (`module.`, `_orig_mod.`, `backbone.`, ...). Without hyperparameters nothing tells
    the bits that steps were fitted to: they are fitted anew then.

    Raises:
        ValueError: The file cannot be read or nothing in it fits.
    """
    content = read_file(path, "init_from")
    state = find_state_dict(content, "init_from")
    _name_averaged(content, path, "init_from")
    arguments = content.get("hyper_parameters")
    refit = _fitted_to_other_bits(model, arguments if isinstance(arguments, Mapping) else {})
    return load_entries(model, state, path, "init_from", refit)
