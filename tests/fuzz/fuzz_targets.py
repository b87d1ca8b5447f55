"""What is fuzzed: readers of bytes, real small files to start from, and the errors that are documented."""

import contextlib
import functools
import io
import json
import os
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
from PIL import Image
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.backbones.blocks import BasicBlock
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.checkpointing import AtomicCheckpointIO, newest_checkpoint
from lightning_n2uq.cli import main
from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.datamodules._data.decode import BrokenImageError, decode
from lightning_n2uq.export import describe, load_safetensors, save_safetensors
from lightning_n2uq.interop import load_official_checkpoint, save_official_checkpoint
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.report import write_report

LINE = 4000  # characters of a message; the official format's names 20 entries


@dataclass
class Target:
    """A reader.

    Attributes:
        seeds: Makes real files, as bytes.
        read: Takes bytes; raises an error of `errors`, or nothing.
        errors: The documented ones, each with a message of one line.
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...] = (ValueError,)


class Folder:
    """A folder for the files that the readers get, made when it is first needed, gone with the process."""

    _kept: tempfile.TemporaryDirectory | None = None

    @classmethod
    def path(cls, name):
        if cls._kept is None:
            cls._kept = tempfile.TemporaryDirectory()
        return Path(cls._kept.name, name)

    @classmethod
    def write(cls, name, data):
        path = cls.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


def outcome(target, data):
    """`read`, or the type of the documented error; everything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(data)
        except target.errors as error:
            line = str(error)
            if not line or "\n" in line or len(line) > LINE:
                raise AssertionError(f"not one clear line: {line[:300]!r}") from error
            return type(error).__name__
    return "read"


def images():
    found = []
    picture = Image.effect_noise((24, 16), 60).convert("RGB")
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        file = io.BytesIO()
        picture.save(file, kind)
        found.append(file.getvalue())
    return found


CODECS = [
    NUQCodec(bits=4, bucket_size=64), NUQCodec(bits=3, bucket_size=64, norm="linf"),
    NUQCodec(bits=2, bucket_size=256, coding="huffman"), NUQCodec(bits=3, bucket_size=256, coding="huffman"),
]  # fmt: skip
NUMEL = 1003


def payloads():
    values = torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)) ** 3
    return [bytes([i, *codec.encode(values, seed=1).tolist()]) for i, codec in enumerate(CODECS)]


def read_payload(data):
    """The first byte chooses the codec, as a setting that both ends share does."""
    codec = CODECS[data[0] % len(CODECS)] if data else CODECS[0]
    payload = torch.tensor(list(data[1:]), dtype=torch.uint8)
    decoded = codec.decode(payload, NUMEL)
    if decoded.shape != (NUMEL,) or decoded.dtype != torch.float32:
        raise AssertionError(f"decoded {decoded.dtype} {tuple(decoded.shape)}")


def tiny_classifier():
    torch.manual_seed(0)
    return QuantizedClassifier(backbone_args={"width": 2}, in_channels=1, image_size=8)


def checkpoint():
    model = tiny_classifier()
    return {
        "state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "optimizer_states": [],
        "lr_schedulers": [], "epoch": 1, "global_step": 3, "pytorch-lightning_version": lightning.__version__,
    }  # fmt: skip


def checkpoints():
    """With a digest, without, and only the pickle inside."""
    file = io.BytesIO()
    torch.save(checkpoint(), file)
    sealed = Folder.path("sealed.ckpt")
    AtomicCheckpointIO().save_checkpoint(checkpoint(), sealed)
    return [_inner(file.getvalue()), file.getvalue(), sealed.read_bytes()]


def _pickle_of(archive):
    return next(name for name in archive.namelist() if name.endswith("/data.pkl"))


def _inner(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(_pickle_of(archive))


@functools.cache
def _entries():
    """Names and contents of a whole archive."""
    file = io.BytesIO()
    torch.save(checkpoint(), file)
    with zipfile.ZipFile(file) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def with_pickle(data):
    """A whole archive around a pickle: what is no archive is taken for one, so that fuzzing gets inside."""
    if not data.startswith(b"\x80"):
        return data
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in _entries():
            archive.writestr(name, data if name.endswith("/data.pkl") else content)
    return made.getvalue()


def read_checkpoint_file(data):
    path = Folder.write("case.ckpt", with_pickle(data))
    QuantizedClassifier.from_checkpoint(str(path))


def resume(data):
    """The newest file is damaged, the one before it whole: never an error."""
    whole = Folder.path("resume/one/whole.ckpt")
    if not whole.exists():
        whole.parent.mkdir(parents=True)
        AtomicCheckpointIO().save_checkpoint(checkpoint(), whole)
        os.utime(whole, (1e9, 1e9))
    case = Folder.write("resume/two/case.ckpt", with_pickle(data))
    found = newest_checkpoint(Folder.path("resume"))
    if found.path not in (whole, case) or any("\n" in line for line in found.rejected):
        raise AssertionError(found)


def official_model():
    torch.manual_seed(0)
    return backbones.build(
        "resnet20", weight_bits=2, activation_bits=2, num_classes=3, in_channels=1, width=2
    )


def officials():
    path = Folder.path("official.pt")
    save_official_checkpoint(official_model(), path, epoch=3)
    return [path.read_bytes()]


def read_official(data):
    path = Folder.write("case.pt", with_pickle(data))
    load_official_checkpoint(path, official_model())


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(QuantSpec(2, 2, "n2uq", "n2uq"), BasicBlock, (1, 1), 4, 5, 2, True, False).eval()


def networks():
    path = Folder.path("net.safetensors")
    save_safetensors(describe(small_network(), (2, 16, 16), {"best_score": "val/acc=0.9"}), path)
    return [path.read_bytes()]


def read_network(data):
    load_safetensors(Folder.write("case.safetensors", data))


def with_steps(data, steps):
    """The safetensors file with another text in place of its list of steps."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["steps"] = steps
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def configs():
    root = Path(__file__).parents[2] / "configs/digits"
    return [path.read_bytes() for path in sorted(root.glob("*.yaml"))]


def read_config(data):
    """Parsed and printed: exit code 0, or 2 with one line."""
    path, error = Folder.write("case.yaml", data), io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        code = main(["fit", "--config", str(path), "--print_config"])
    text = error.getvalue()
    if code not in (0, 2) or "Traceback" in text or (code == 2) != (text.count("n2uq: error: ") == 1):
        raise AssertionError((code, text[:500]))
    if code:
        raise ValueError(text.strip().splitlines()[-1])


RUN_FILES = ("metrics.csv", "quantization.jsonl", "confusion.json", "config.yaml")


def run_files():
    """One byte that names the file, then its content."""
    metrics = b"epoch,step,train/loss,val/acc\n0,0,2.3,\n0,9,1.1,0.5\n1,19,,0.75\n"
    weight = {"bits": 2, "count": 9, "usage": [1, 2, 3, 3], "clipped": 0.4, "changed": None, "scale": 0.1}
    activation = {
        "bits": 2, "usage": [5, 0, 2, 1], "clipped_low": 0.5, "clipped_high": 0.1, "low": -0.5, "high": 2.0,
        "histogram": [5.0] * 20, "start": 0.0, "scale_in": 1.0, "scale_out": 1.0, "widths": [0.5, 0.6, 0.7],
        "thresholds": [0.2, 0.8, 1.4], "widths_at_floor": 0, "curve": [],
    }  # fmt: skip
    layers = [{"name": "layer1.conv1", "weight": weight, "activation": activation}]
    lines = [json.dumps({"step": step, "epoch": 0, "layers": layers}) for step in (9, 19)]
    confusion = json.dumps({"val": [[3, 1], [0, 4]]}).encode()
    contents = (
        metrics,
        "\n".join(lines).encode(),
        confusion,
        b"# name: test\nmodel:\n  init_args:\n    lr: 1\n",
    )
    return [bytes([i]) + content for i, content in enumerate(contents)]


def read_report(data):
    contents = [seed[1:] for seed in run_files()]
    if data:
        contents[data[0] % len(RUN_FILES)] = data[1:]
    for name, content in zip(RUN_FILES, contents, strict=True):
        folder = Folder.write(f"runs/case/{name}", content).parent
    write_report([folder])


TARGETS = {
    "image": Target(images, lambda data: decode(data, "case.png", 3), (BrokenImageError,)),
    "payload": Target(payloads, read_payload),
    "checkpoint": Target(checkpoints, read_checkpoint_file),
    "resume": Target(checkpoints, resume, ()),
    "official": Target(officials, read_official),
    "safetensors": Target(networks, read_network),
    "config": Target(configs, read_config),
    "report": Target(run_files, read_report),
}
