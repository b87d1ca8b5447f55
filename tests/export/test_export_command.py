import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra 'export')")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra 'export')")

import onnx

from lightning_n2uq.export import command, load_safetensors
from lightning_n2uq.export.formats.onnx_file import newest_opset, opset_of
from lightning_n2uq.export.runtime.engines import session
from lightning_n2uq.export.verify.parity import ParityReport, Tally
from lightning_n2uq.modules import QuantizedClassifier


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A trained network's file, as the Trainer writes it."""
    torch.manual_seed(0)
    settings = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4}, "weight_bits": 2}
    model = QuantizedClassifier(**settings)
    path = tmp_path_factory.mktemp("run") / "best.ckpt"
    content = {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "epoch": 39,
        "callbacks": {"ModelCheckpoint": {"monitor": "val/acc", "best_model_score": torch.tensor(0.985)}},
    }
    torch.save(content, path)
    return str(path)


def export(checkpoint, tmp_path, *arguments, name="net.onnx"):
    return command.main(["--ckpt", checkpoint, "-o", str(tmp_path / name), *arguments])


@pytest.mark.integration
def test_onnx_is_written_and_verified_on_the_digits(checkpoint, tmp_path, capsys):
    arguments = ["--verify", "digits", "--sweep", "500", "--engines", "torch,numpy,onnxruntime"]
    assert export(checkpoint, tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    assert "180 images" in printed
    assert "parity: all engines agree" in printed
    assert "sweep: all engines agree" in printed
    assert "layer3.2.conv2.codes" in printed
    assert "accuracy:" in printed
    head = printed.splitlines()[printed.splitlines().index("codes that differ from torch, 180 images") + 1]
    assert head.split() == ["numpy", "onnxruntime", "evaluation", "float"]
    assert "file / float32: 0." in printed


def test_the_file_carries_what_is_known_about_the_network(checkpoint, tmp_path):
    assert export(checkpoint, tmp_path) == 0
    model = onnx.load(tmp_path / "net.onnx")
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert notes["backbone"] == "resnet20"
    assert notes["weight_quantizer"] == notes["activation_quantizer"] == "n2uq"
    assert notes["weight_bits"] == notes["activation_bits"] == "2"
    assert notes["best_score"] == "val/acc=0.985"
    assert notes["package"].startswith("lightning_n2uq ")
    assert notes["git_revision"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    runtime = session(model.SerializeToString())
    for batch in (1, 3):
        (logits,) = runtime.run(None, {"images": np.zeros((batch, 1, 8, 8), np.float32)})
        assert logits.shape == (batch, 10)


@pytest.mark.parametrize("name", ["qonnx", "safetensors"])
def test_other_formats_are_verified_from_their_own_files(checkpoint, tmp_path, capsys, name):
    engines = "torch,numpy"
    arguments = ["--format", name, "--verify", "random:4", "--engines", engines]
    assert export(checkpoint, tmp_path, *arguments, name=f"net.{name}") == 0
    assert "parity: all engines agree" in capsys.readouterr().out
    if name == "safetensors":
        assert load_safetensors(tmp_path / "net.safetensors").metadata["backbone"] == "resnet20"
    else:
        kinds = {node.op_type for node in onnx.load(tmp_path / "net.qonnx").graph.node}
        assert "MultiThreshold" in kinds


@pytest.mark.integration
def test_pixels_are_normalized_inside_the_network(checkpoint, tmp_path, capsys):
    arguments = ["--mean", "0.3053", "--std", "0.3760", "--pixel-scale", "16"]
    verify = ["--verify", "digits", "--engines", "torch,onnxruntime"]
    assert export(checkpoint, tmp_path, *arguments, *verify) == 0
    assert "parity: all engines agree" in capsys.readouterr().out
    runtime = session((tmp_path / "net.onnx").read_bytes())
    assert runtime.get_inputs()[0].type == "tensor(uint8)"
    assert runtime.run(None, {"pixels": np.zeros((2, 1, 8, 8), np.uint8)})[0].shape == (2, 10)


def test_a_mismatch_gives_a_table_and_a_failure(checkpoint, tmp_path, capsys, monkeypatch):
    honest = Tally.add

    def add(self, reference, other):
        reference.codes["layer1.0.conv1.codes"][:] ^= 1
        honest(self, reference, other)

    monkeypatch.setattr(Tally, "add", add)
    arguments = ["--verify", "random:2", "--engines", "torch,numpy"]
    assert export(checkpoint, tmp_path, *arguments) == 1
    printed = capsys.readouterr().out
    assert "parity: MISMATCH" in printed
    assert "512/512" in printed


def test_images_and_labels_come_from_an_archive(checkpoint, tmp_path, capsys):
    images = np.random.default_rng(0).standard_normal((5, 1, 8, 8))
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(5))
    arguments = ["--verify", str(tmp_path / "data.npz"), "--engines", "torch,numpy", "--verify-images", "3"]
    assert export(checkpoint, tmp_path, *arguments) == 0
    printed = capsys.readouterr().out
    assert "3 images" in printed
    assert "accuracy:" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--verify", "elsewhere"], "verify: got 'elsewhere', allowed are digits"),
        (["--verify", "missing.npz"], "verify: cannot read 'missing.npz'"),
        (["--verify", "random:2", "--engines", "torch,tpu"], "engines: got torch, tpu; allowed are"),
        (["--verify", "random:2", "--engines", "torch"], "two or more"),
        (["--mean", "0.5"], "mean, std: one without the other"),
        (["--mean", "0.5,0.5", "--std", "1,1"], r"mean: got \[0.5, 0.5\], allowed are 1 finite"),
        (["--mean", "0.5", "--std", "0"], "allowed are positive numbers"),
    ],
)
def test_mistakes_are_one_line(checkpoint, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        export(checkpoint, tmp_path, *arguments)
    assert "\n" not in str(caught.value)


def test_checkpoints_that_are_missing_foreign_or_of_another_version(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="ckpt: no such file"):
        export("nowhere.ckpt", tmp_path)
    foreign = tmp_path / "foreign.ckpt"
    foreign.write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"ckpt: .* is damaged, cut short, or no checkpoint"):
        export(str(foreign), tmp_path)
    torch.save({"model": torch.zeros(1)}, foreign)
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):
        export(str(foreign), tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["no_such_setting"] = 1
    content["lightning_n2uq_version"] = "99.0"
    torch.save(content, foreign)
    with pytest.raises(ValueError, match=r"ckpt: .* was written by version 99.0, this is"):
        export(str(foreign), tmp_path)


def test_a_failure_leaves_no_half_file(checkpoint, tmp_path, monkeypatch):
    target = tmp_path / "net.onnx"
    target.write_text("before")

    def fail(*arguments: object) -> None:
        raise RuntimeError("disk")

    monkeypatch.setattr("onnx.ModelProto.SerializeToString", fail)
    with pytest.raises(RuntimeError, match="disk"):
        export(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    assert target.read_text() == "before"


def test_missing_packages_name_the_extra(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx missing; pip install '"):
        export(checkpoint, tmp_path)


def test_an_onnx_too_old_for_two_bits_is_one_line_with_advice(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("onnx.defs.onnx_opset_version", lambda: 23)
    monkeypatch.setattr("onnx.__version__", "1.18.0")
    message = (
        "opset: got 25, but the installed onnx 1.18.0 knows up to 23; pip install -U onnx, or --opset 21"
    )
    with pytest.raises(ValueError, match=message):
        export(checkpoint, tmp_path, "--opset", "25")
    assert not list(tmp_path.iterdir())
    assert export(checkpoint, tmp_path) == 0


@pytest.mark.parametrize(("runtime", "opset"), [("1.23.2", 21), ("1.24.1", 25), ("2.0", 25), (None, 25)])
def test_the_default_opset_is_one_that_the_installed_runtime_reads(monkeypatch, runtime, opset):
    def version(package):
        if runtime is None:
            raise PackageNotFoundError(package)
        return runtime

    monkeypatch.setattr("lightning_n2uq.export.formats.onnx_file.version", version)
    assert newest_opset() == opset


def test_an_older_opset_is_verified_with_that_opset(checkpoint, tmp_path, monkeypatch):
    opsets = []
    monkeypatch.setattr(
        "lightning_n2uq.export.runtime.engines.session",
        lambda model, threads: opsets.append(opset_of(model)) or session(model, threads),
    )
    verify = ("--verify", "random:2", "--engines", "torch,onnxruntime")
    assert export(checkpoint, tmp_path, "--opset", "21", *verify) == 0
    assert opsets == [21, 21]


def test_a_file_that_the_runtime_cannot_read_is_one_line():
    with pytest.raises(ValueError, match=r"^engines: onnxruntime \S+ cannot read it \([^\n]*\)$"):
        session(b"no model")


def test_columns_of_the_report_stay_apart_at_any_count():
    tally = Tally(codes={"layer": 107_118}, values={"layer": 8_192_000})
    report = ParityReport("torch", {"numpy": tally, "onnxruntime": tally}, images=2000)
    (row,) = (line for line in report.table().splitlines() if line.startswith("layer"))
    assert row.split() == ["layer", "107118/8192000", "107118/8192000"]
