"""Exported ResNet-18 in onnxruntime on the CPU against the float network's file, side by side.

    python -m benchmarks export                   # 1 and 2 threads, batch 1 and 16, 224x224
    python -m benchmarks export --quick           # one small case, a check that it runs

All networks live in one process and take turns; a figure is the ratio within a round. The profile sums every
kind of node's fastest run. Weights are random (no influence on time), norms and thresholds fit random images.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.backbones import resnet18
from lightning_n2uq.export import describe
from lightning_n2uq.layers import BiasedPReLU
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

BASE = "float"


def float_file(size: int) -> bytes:
    """Torchvision's network as torch writes it, batch norms folded by onnxruntime itself."""
    import torchvision

    model = torchvision.models.resnet18().eval()
    file = io.BytesIO()
    example = torch.randn(2, 3, size, size)
    program = torch.onnx.export(
        model, (example,), dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    program.save(file)  # type: ignore[union-attr]
    return file.getvalue()


def trained_network(bits: int, size: int) -> nn.Module:
    """This package's network, with uneven thresholds as after training."""
    torch.manual_seed(0)
    model = resnet18(bits, bits)
    for module in model.modules():
        if isinstance(module, LearnableThresholdQuantizer):
            nn.init.uniform_(module.widths, 1.0 / module.num_levels, 3.0 / module.num_levels)
        if isinstance(module, BiasedPReLU):
            nn.init.normal_(module.bias_in, 0, 0.1)
            nn.init.normal_(module.bias_out, 0, 0.1)
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(4, 3, size, size))
    return model.eval()


def integer_file(bits: int, size: int) -> bytes:
    """This package's export of `trained_network`."""
    from lightning_n2uq.export.formats.onnx_file import to_onnx

    return to_onnx(describe(trained_network(bits, size), (3, size, size))).SerializeToString()


def open_session(model: bytes, threads: int, profile: str | None = None) -> Any:
    """An onnxruntime session, which writes a profile if a prefix for it is given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if threads > 1:
        # Threads that spin while another network has its turn would be counted as its processor time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _runner(model: bytes, threads: int, images: np.ndarray) -> Callable[[], object]:
    session = open_session(model, threads)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})


def profile(model: bytes, images: np.ndarray, runs: int) -> dict[str, float]:
    """Milliseconds by kind of operator: the sum of every node's fastest run, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, 1, str(Path(folder) / "profile"))
        name = session.get_inputs()[0].name
        for _ in range(runs):
            session.run(None, {name: images})
        events = json.loads(Path(session.end_profiling()).read_text())
    fastest: dict[tuple[str, str], float] = defaultdict(lambda: np.inf)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["args"]["op_name"], event["name"])
            fastest[key] = min(fastest[key], event["dur"] / 1e3)
    total: dict[str, float] = defaultdict(float)
    for (kind, _), milliseconds in fastest.items():
        total[kind] += milliseconds
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return {"all": round(sum(total.values()), 3), **{kind: round(value, 3) for kind, value in ordered}}


def profile_table(profiles: dict[str, dict[str, float]]) -> str:
    """A text table, one operator per line."""
    kinds = list(dict.fromkeys(kind for figures in profiles.values() for kind in figures))
    head = "".join(f"{name:>10}" for name in profiles)
    lines = [f"{'milliseconds by operator':<36}{head}"]
    for kind in kinds:
        cells = "".join(f"{figures.get(kind, 0.0):>10.2f}" for figures in profiles.values())
        lines.append(f"  {kind:<34}{cells}")
    return "\n".join(lines)


def measure(
    files: dict[str, bytes], seconds: float, size: int, threads: tuple[int, ...], batches: tuple[int, ...]
) -> dict[str, object]:
    """Measures and prints; `seconds` for every combination of threads and batch size.

    Args:
        files: ONNX files by name, `BASE` among them.
        seconds: time for every comparison.
        size: height and width of the images, of three channels.
        threads: numbers of threads.
        batches: batch sizes.
    """
    result: dict[str, object] = {}
    rng = np.random.default_rng(0)
    for count in threads:
        for batch in batches:
            images = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
            runners = {name: _runner(file, count, images) for name, file in files.items()}
            figures = summary(take_turns(runners, seconds, torch.device("cpu"), rounds=1000), BASE)
            title = f"ResNet-18 in onnxruntime on the CPU, {batch} x {size}x{size}, threads: {count}"
            print(table(title, figures), flush=True)
            result[f"threads {count}, batch {batch}"] = figures
    images = rng.standard_normal((1, 3, size, size)).astype(np.float32)
    profiles = {name: profile(file, images, max(3, int(2 * seconds))) for name, file in files.items()}
    print(profile_table(profiles))
    return {**result, "profile_ms": profiles}


def run(
    device: torch.device,
    seconds: float,
    size: int = 224,
    threads: tuple[int, ...] = (1, 2),
    batches: tuple[int, ...] = (1, 16),
) -> dict[str, object]:
    """The topic; always on the CPU, whatever the device, with these numbers of threads."""
    import onnxruntime

    files = {BASE: float_file(size), "W2A2": integer_file(2, size), "W4A4": integer_file(4, size)}
    figures = measure(files, seconds, size, threads, batches)
    sizes = {name: len(file) for name, file in files.items()}
    return {"size": size, "bytes": sizes, "onnxruntime": onnxruntime.__version__, **figures}
