"""Exported ResNet-18 on the CPU beside what else a user could deploy, side by side in one process.

    python -m benchmarks export                   # 1 and 2 threads, batch 1 and 16, 224x224
    python -m benchmarks export --quick           # one small case, a check that it runs

onnxruntime with the float network and with its own static quantization to 8 bits, openvino with the latter's
file where it is installed, and this package's networks: the ONNX file in onnxruntime, the compiled package,
`FastNetwork`, also of integer-only networks. All take turns; a figure is the ratio to onnxruntime's float
file within a round. The profile sums every kind of node's fastest run. Weights are random (no influence on
time), norms and thresholds fit random images.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from benchmarks import export_engines as engines
from benchmarks.export_engines import Images, Opener
from benchmarks.machine import package_version
from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.export.ir.description import Description

BASE = "float"
ROUNDS = 15
"""Rounds at least."""
PAUSE = 0.02
"""Seconds between turns, in which threads that still spin go to sleep."""


def profile(model: bytes, images: np.ndarray, runs: int) -> dict[str, float]:
    """Milliseconds by kind of operator: the sum of every node's fastest run, one thread."""
    with tempfile.TemporaryDirectory() as folder:
        session = engines.open_session(model, 1, str(Path(folder) / "profile"))
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
    openers: Mapping[str, Opener],
    files: Mapping[str, bytes],
    seconds: float,
    size: int,
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    rounds: int = ROUNDS,
) -> dict[str, object]:
    """Measures and prints; `seconds` for every combination of threads and batch size.

    Args:
        openers: Engines by name, `BASE` among them.
        files: ONNX files to profile, by name.
        seconds: Time for every comparison.
        size: Height and width of the images, of three channels.
        threads: Numbers of threads.
        batches: Batch sizes.
        rounds: Rounds at least, whatever time they take.
    """
    result: dict[str, object] = {}
    rng = np.random.default_rng(0)
    for count in threads:
        for batch in batches:
            images = rng.standard_normal((batch, 3, size, size)).astype(np.float32)
            runners = {name: opener(count, images) for name, opener in openers.items()}
            turns = take_turns(runners, seconds, torch.device("cpu"), 1000, rounds, PAUSE)
            figures = summary(turns, BASE)
            title = f"ResNet-18 on the CPU, {batch} x {size}x{size}, threads: {count}"
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
    bits: tuple[int, ...] = (2, 4),
    rounds: int = ROUNDS,
) -> dict[str, object]:
    """The topic; always on the CPU, whatever the device, with these numbers of threads."""
    images = np.random.default_rng(1).standard_normal((8, 3, size, size)).astype(np.float32)
    files = others(size, images)
    openers = {name: engines.onnxruntime_opener(file) for name, file in files.items()}
    if find_spec("openvino") is not None:
        openers["openvino int8"] = engines.openvino_opener(files["static int8"])
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        for count in bits:
            description = engines.integer_network(count, size)
            name = f"W{count}A{count}"
            openers.update(ours(name, description, files, Path(folder)))
            openers[f"{name} integer-only fast"] = engines.fast_opener(
                engines.integer_network(count, size, 8)
            )
        figures = measure(openers, files, seconds, size, threads, batches, rounds)
    torch.set_num_threads(before)
    sizes = {name: len(file) for name, file in files.items()}
    return {"size": size, "bytes": sizes, "versions": versions(), **figures}


def others(size: int, images: Images) -> dict[str, bytes]:
    """The float file and what onnxruntime's static quantization makes of it."""
    floating = engines.float_file(size)
    return {BASE: floating, "static int8": engines.static_int8_file(floating, images)}


def ours(name: str, description: Description, files: dict[str, bytes], folder: Path) -> dict[str, Opener]:
    """This package's engines; the ONNX file is added to `files`, packages need a C++ compiler."""
    from lightning_n2uq.export.formats.onnx_file import to_onnx
    from lightning_n2uq.export.formats.pt2_file import save_pt2

    files[name] = to_onnx(description).SerializeToString()
    openers = {
        f"{name} onnx": engines.onnxruntime_opener(files[name]),
        f"{name} fast": engines.fast_opener(description),
    }
    if shutil.which("g++"):
        path = folder / f"{name}.pt2"
        save_pt2(description, path)
        openers[f"{name} pt2"] = engines.pt2_opener(path)
    return openers


def versions() -> dict[str, str | None]:
    """Releases of the engines."""
    return {name: package_version(name) for name in ("onnxruntime", "openvino", "torch")}
