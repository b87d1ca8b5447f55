"""`n2uq export` of networks that have no form by steps."""

import json
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from lightning_n2uq.export import command
from lightning_n2uq.export.program import command as program_command
from lightning_n2uq.export.program.explain import Explanation, explain_file
from lightning_n2uq.export.program.onnx_program import Inputs
from lightning_n2uq.modules import QuantizedClassifier

VIT = {
    "backbone": "timm/vit_tiny_patch16_224",
    "backbone_args": {
        "model_args": {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2}
    },
    "in_channels": 1,
    "image_size": 16,
    "num_classes": 5,
}


def saved(folder, name, **settings):
    torch.manual_seed(0)
    model = QuantizedClassifier(**settings)
    model.train()(torch.randn(8, settings["in_channels"], settings["image_size"], settings["image_size"]))
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 3}
    torch.save(content, folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("vit"), "best.ckpt", **VIT)


def export(checkpoint, path, *arguments):
    return command.main(["--ckpt", checkpoint, "-o", str(path), *arguments])


@pytest.mark.integration
def test_a_transformer_is_written_by_torch_and_its_differences_are_explained(transformer, tmp_path, capsys):
    assert export(transformer, tmp_path / "net.onnx", "--verify", "random:20") == 0
    printed = capsys.readouterr().out
    assert "by torch's exporter: " in printed
    assert "integer arithmetic: " in printed
    assert "batch size any" in printed
    assert "blocks.0.attn.qkv" in printed
    assert "parity over 20 examples: all differences are codes at thresholds and roundings" in printed
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (logits,) = session.run(None, {session.get_inputs()[0].name: np.zeros((3, 1, 16, 16), np.float32)})
    assert logits.shape == (3, 5)
    properties = {p.key: p.value for p in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert properties["backbone"] == "timm/vit_tiny_patch16_224"
    assert properties["epoch"] == "3"
    assert json.loads(properties["num_classes"]) == 5


@pytest.mark.integration
def test_what_differs_otherwise_is_a_mismatch(transformer, tmp_path, capsys, monkeypatch):
    def wrong(program, inputs):
        explanation = explain_file(program, inputs)
        explanation.forced = 0.5
        return explanation

    monkeypatch.setattr("lightning_n2uq.export.program.command.explain_file", wrong)
    assert export(transformer, tmp_path / "net.onnx", "--verify", "random:4") == 1
    assert "parity over 4 examples: MISMATCH" in capsys.readouterr().out


@pytest.mark.integration
def test_a_network_with_steps_is_written_by_torch_only_if_asked(tmp_path, capsys):
    checkpoint = saved(
        tmp_path, "net.ckpt", in_channels=1, image_size=8, backbone_args={"width": 4}, weight_bits=2
    )
    assert export(checkpoint, tmp_path / "steps.onnx") == 0
    assert "by torch's exporter" not in capsys.readouterr().out
    assert export(checkpoint, tmp_path / "torch.onnx", "--exporter", "torch", "--verify", "random:4") == 0
    assert "by torch's exporter: as asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exporter", "steps"], "has no deployed form|cannot be traced"),
        (["--format", "safetensors"], "has no deployed form|cannot be traced"),
        (
            ["--exporter", "torch", "--format", "qonnx"],
            "exporter: got 'torch' with format 'qonnx', allowed is",
        ),
        (["--sweep", "3", "--verify", "random:2"], "sweep: got 3, which torch's exporter does not take"),
        (["--mean", "0.5", "--std", "0.5"], "mean: got .*, which torch's exporter does not take"),
    ],
)
def test_mistakes_are_one_line(transformer, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        export(transformer, tmp_path / "net.onnx", *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "net.onnx").exists()


def test_batches_of_image_lists_are_compared_in_the_files_pieces(monkeypatch, capsys):
    compared = []

    def explained(program, *others):
        compared.append([x.shape for x in others[-1].tensors()])
        return Explanation()

    monkeypatch.setattr(program_command, "explain_file", explained)
    monkeypatch.setattr(program_command, "explain_modules", explained)
    image, other = torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)
    program = SimpleNamespace(inputs=Inputs(([image, image],)), dynamic=False)
    batches = [Inputs(([image] * 5,)), Inputs(((image, other),)), Inputs(([image] * 2,))]
    assert program_command._compared(program, torch.nn.Identity(), batches) == 0
    assert compared == [[image.shape] * 2] * 6  # 2 comparisons of 2 + 1 pieces; 1 image is left over
    assert "parity over 6 examples" in capsys.readouterr().out
