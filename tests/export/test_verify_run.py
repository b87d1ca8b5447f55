import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")

from lightning_n2uq.export import command
from lightning_n2uq.export.verify.data import verification_batches
from lightning_n2uq.modules import QuantizedClassifier


def export(checkpoint, tmp_path, *arguments):
    chosen = ["--ckpt", str(checkpoint), "-o", str(tmp_path / "net.onnx"), *arguments]
    return command.main([*chosen, "--engines", "torch,numpy"])


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A run on image files, whose loader leaves normalizing to the device: checkpoint, config, images."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("images")
    model = QuantizedClassifier(in_channels=3, image_size=32, backbone_args={"width": 4}, weight_bits=2)
    content = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(content, folder / "best.ckpt")
    rng = np.random.default_rng(0)
    for number in range(30):
        place = folder / "images" / ("train" if number < 20 else "test") / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(place / f"{number}.png")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for file in (folder / "images").rglob("*.png"):
            archive.write(file, file.relative_to(folder / "images").as_posix())
    options = {"root": str(folder / "images"), "augment_on_device": True, "cache": False}
    data = {"class_path": "CIFAR10DataModule", "init_args": options}
    (folder / "config.yaml").write_text(json.dumps({"data": data}))
    return folder


@pytest.mark.integration
@pytest.mark.parametrize(
    "arguments",
    [["run"], ["images.zip"], ["images"], ["config.yaml", "--verify-root", "images.zip"]],
    ids=["run", "zip", "folder", "config and root"],
)
def test_a_run_is_verified_on_its_own_images(image_run, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(image_run)
    assert export("best.ckpt", tmp_path, "--verify", *arguments) == 0
    printed = capsys.readouterr().out
    assert "codes that differ from torch, 10 images" in printed
    # Were the images not normalized, the float evaluation would still agree; so they are looked at.
    (images, labels), *rest = verification_batches("config.yaml", (3, 32, 32))
    assert not rest
    assert sorted(labels) == list(range(10))
    assert images.min() < -1
    assert "against the plain float modules: 0 % of the codes and 0 % of the top-1 answers differ" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verify", "digits.yaml", "--verify-root", "x"], "got 'x', but DigitsDataModule has no root"),
        (["--verify", "images.zip", "--verify-root", "x"], "verify_root: got 'x' beside verify 'images.zip'"),
        (["--verify", "random:2", "--verify-root", "x"], "verify_root: got 'x', allowed with a config only"),
        (["--verify-root", "x"], "verify_root: got 'x' without verify"),
    ],
)
def test_a_root_that_would_be_ignored_is_a_mistake(image_run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(image_run)
    (image_run / "digits.yaml").write_text(json.dumps({"data": {"class_path": "DigitsDataModule"}}))
    with pytest.raises(ValueError, match=message):
        export("best.ckpt", tmp_path, *arguments)


def test_a_zip_without_a_config_beside_the_checkpoint_is_a_mistake(image_run, tmp_path):
    shutil.copy(image_run / "best.ckpt", tmp_path)
    with pytest.raises(ValueError, match=r"needs the run's config\.yaml beside the checkpoint"):
        export(tmp_path / "best.ckpt", tmp_path, "--verify", str(image_run / "images.zip"))
