"""Writes a LightningModule of one's own, trained with `QuantizeModel`, as ONNX with integer layers.

python export.py regression.Regressor runs/regression/TIME/best.ckpt regressor.onnx
"""

import importlib
import sys

import torch

import lightning_n2uq.callbacks  # noqa: F401 -- from here on, checkpoints of quantized modules load
from lightning_n2uq.export import explain_file, export_program


def export(name: str, checkpoint: str, path: str) -> None:
    """Exports, and compares the file with the module.

    Args:
        name: `file.Class` in the current folder.
        checkpoint: The trained module.
        path: The file to write.
    """
    file, _, kind = name.rpartition(".")
    module = getattr(importlib.import_module(file), kind).load_from_checkpoint(checkpoint).cpu().eval()
    example = torch.randn_like(module.example_input_array)
    program = export_program(module, example)
    program.save(path)
    print(program.deployed.summary())
    print(explain_file(program).table())


if __name__ == "__main__":
    export(*sys.argv[1:])
