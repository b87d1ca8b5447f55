"""What an exported file says by itself: class names, preprocessing, names of what goes in and out."""

import json

import numpy as np
import pytest
import torch

from lightning_n2uq.cli import main
from lightning_n2uq.export import describe, load_safetensors
from lightning_n2uq.export.command import main as export
from lightning_n2uq.export.ir.description import with_output_named
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.utils.preprocessing import Preprocessing

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra 'export')")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
STEPS = Preprocessing(3, 18, 16, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


def checkpoint(path, **state):
    torch.manual_seed(0)
    arguments = {"backbone": "resnet20", "num_classes": 3, "image_size": 16, "backbone_args": {"width": 4}}
    model = QuantizedClassifier(**arguments)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({**content, "ImageFolderDataModule": state}, path)
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A checkpoint as a run on own images leaves it, and its model."""
    path = tmp_path / "best.ckpt"
    model = checkpoint(path, class_names=["ant", "bee", "wasp"], preprocessing=STEPS.as_dict())
    return path, model


def told(path):
    entries = onnx.load(path).metadata_props
    return {entry.key: entry.value for entry in entries}


def test_names_and_preprocessing_are_in_the_file_and_said(run, tmp_path, capsys):
    assert export(["--ckpt_path", str(run[0]), "-o", str(tmp_path / "net.onnx")]) == 0
    about = told(tmp_path / "net.onnx")
    assert json.loads(about["class_names"]) == ["ant", "bee", "wasp"]
    assert json.loads(about["preprocessing"]) == STEPS.as_dict()
    out = capsys.readouterr().out
    assert "input images: float32 [N, 3, 16, 16]" in out
    assert "shorter side to 18, central crop 16x16, (pixel / 255 - mean) / std, mean 0.5, 0.4, 0.3" in out
    assert "output logits: ant, bee, wasp" in out
    session = ort.InferenceSession(tmp_path / "net.onnx")
    assert [value.name for value in session.get_inputs()] == ["images"]
    assert [value.name for value in session.get_outputs()] == ["logits"]


def test_pixels_are_normalized_inside_by_the_runs_own_numbers(run, tmp_path, capsys):
    path, model = run
    assert export(["--ckpt", str(path), "-o", str(tmp_path / "net.onnx"), "--pixels"]) == 0
    assert "input pixels: uint8 [N, 3, 16, 16]" in capsys.readouterr().out
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    (logits,) = ort.InferenceSession(tmp_path / "net.onnx").run(["logits"], {"pixels": pixels})
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (STEPS.mean, STEPS.std))
    with torch.no_grad():
        wanted = model((torch.from_numpy(pixels).float() - mean) / std)
    np.testing.assert_allclose(logits, wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_safetensors_keep_them_too(run, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra 'export')")
    assert (
        export(["--ckpt", str(run[0]), "-o", str(tmp_path / "n.safetensors"), "--format", "safetensors"]) == 0
    )
    loaded = load_safetensors(tmp_path / "n.safetensors")
    assert json.loads(loaded.metadata["class_names"]) == ["ant", "bee", "wasp"]
    assert json.loads(loaded.metadata["preprocessing"]) == STEPS.as_dict()


@pytest.mark.integration
def test_what_torchs_exporter_writes_is_named_and_tells_likewise(run, tmp_path):
    assert export(["--ckpt", str(run[0]), "-o", str(tmp_path / "net.onnx"), "--exporter", "torch"]) == 0
    assert json.loads(told(tmp_path / "net.onnx")["preprocessing"]) == STEPS.as_dict()
    assert [value.name for value in ort.InferenceSession(tmp_path / "net.onnx").get_outputs()] == ["logits"]


def test_pixels_need_to_be_known_and_come_once(run, tmp_path, capsys):
    bare = tmp_path / "bare.ckpt"
    checkpoint(bare, class_names=["ant", "bee", "wasp"])
    output = ["-o", str(tmp_path / "net.onnx"), "--pixels"]
    assert main(["export", "--ckpt", str(bare), *output]) == 2
    assert "pixels: " in (line := capsys.readouterr().err)
    assert "holds no preprocessing, give --mean, --std and --pixel-scale instead" in line
    assert main(["export", "--ckpt", str(run[0]), *output, "--mean", "0,0,0", "--std", "1,1,1"]) == 2
    assert "pixels: given together with mean" in capsys.readouterr().err


def test_a_taken_name_stays():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("logits", torch.nn.Conv2d(3, 4, 1))
    model.add_module("last", torch.nn.ReLU())
    description = with_output_named(describe(model, (3, 8, 8)))
    assert len({step.name for step in description.steps}) == len(description.steps)
