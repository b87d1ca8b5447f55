"""`python -m benchmarks.gpu`: what the kernels reach on one GPU, as times over what the hardware allows.

    python -m benchmarks.gpu                       # everything, about two minutes
    python -m benchmarks.gpu quantizer codec       # some topics
    python -m benchmarks.gpu steps --no-compile

Kernel times are medians of CUDA graph replays by device events (so without Python): of a graph of twenty
calls, taking turns on several inputs, more than a cache holds, divided by twenty (`row_ms`), and of a graph
of one, which adds the start of a graph, ten microseconds and more (`graph_ms`). Plain calls are beside them.
The limit is a copy of a gigabyte, counted as bytes read and bytes written. Results are merged by topic into
one JSON file with the device, the versions and the command.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import gpu_operators
from benchmarks.machine import description
from benchmarks.quantizers import parameters
from lightning_n2uq.backbones import resnet18
from lightning_n2uq.compression import NUQCodec
from lightning_n2uq.ops import threshold_quantize

OUTPUT = Path(__file__).resolve().parent / "results" / "gpu.json"
DEVICE = torch.device("cuda")
CALLS, INPUTS = 20, 4  # in a row, and how many inputs take turns
SHAPES = (32, 64, 56, 56), (256, 64, 56, 56)
NUMELS = 11_689_512, 2**28  # a ResNet-18's gradients, and a gigabyte
MAP = 256, 64, 56, 56  # of a ResNet-18's first stage
BATCH, SIZE = 256, 224  # of a training step
KINDS = {"eager": None, "compile": "default", "compile, CUDA graphs": "reduce-overhead"}


def milliseconds(call: Callable[[], object], rounds: int = 30) -> float:
    """Median time of a call by device events, the queue empty before."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def replayed(*calls: Callable[[], object]) -> Callable[[], object]:
    """The calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls * 3:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def in_a_row(calls: list[Callable[[], object]]) -> float:
    """Milliseconds of one call among many, in turns."""
    many = calls * (CALLS // len(calls))
    return milliseconds(replayed(*many)) / len(many)


def copy_rate() -> float:
    """Gigabytes per second of a large copy, read and written."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def quantizer(rate: float) -> dict[str, object]:
    """Forward and backward against the traffic they must cause: read x, write y; read x and g, write dx."""
    result: dict[str, object] = {}
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for bits in (2, 3, 4):
                mine = parameters(bits, DEVICE)
                calls = [_both(shape, dtype, mine) for _ in range(INPUTS)]
                numel = torch.Size(shape).numel()
                limit = 5 * numel * dtype.itemsize / rate / 1e6
                row, graph, plain = in_a_row(calls), milliseconds(replayed(calls[0])), milliseconds(calls[0])
                name = f"{'x'.join(map(str, shape))} {str(dtype)[6:]} {bits} bits"
                result[name] = {
                    "limit_ms": round(limit, 4),
                    "row_ms": round(row, 4),
                    "graph_ms": round(graph, 4),
                    "call_ms": round(plain, 4),
                    "ratio": round(row / limit, 3),
                    "graph_ratio": round(graph / limit, 3),
                    "call_ratio": round(plain / limit, 3),
                }
                print(f"  {name:<36} {row:8.4f} ms {row / limit:6.3f}x   call {plain:8.4f} ms")
    return result


def _both(shape: tuple[int, ...], dtype: torch.dtype, mine: list[Tensor]) -> Callable[[], object]:
    x = (torch.randn(shape, device=DEVICE) * 1.3 + 0.5).to(dtype).requires_grad_()
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    return lambda: torch.autograd.grad(threshold_quantize(x, *mine), [x, *mine], grad)


def codec(rate: float) -> dict[str, object]:
    """Encode and decode in bytes of fp32 gradients, against a copy's bytes, read and written."""
    result: dict[str, object] = {}
    for numel in NUMELS:
        inputs = [torch.randn(numel, device=DEVICE) for _ in range(INPUTS if numel < 2**25 else 1)]
        copied = [torch.empty_like(x) for x in inputs]
        copies = [lambda x=x, y=y: y.copy_(x) for x, y in zip(inputs, copied, strict=True)]  # type: ignore[misc]
        same_size = 8e-6 * numel / in_a_row(copies)
        result[f"{numel} copy"] = {"gb_per_s": round(same_size, 1)}
        print(f"  {numel:>10} copy, read and written: {same_size:.0f} GB/s")
        for bits in (2, 3, 4, 8):
            for name, calls in _codec_calls(NUQCodec(bits=bits, bucket_size=1024), inputs, copied).items():
                each, graph, plain = in_a_row(calls), milliseconds(replayed(calls[0])), milliseconds(calls[0])
                row = {
                    "row_gb_per_s": round(4e-6 * numel / each, 1),
                    "graph_gb_per_s": round(4e-6 * numel / graph, 1),
                    "call_gb_per_s": round(4e-6 * numel / plain, 1),
                    "share_of_large_copy": round(4e-6 * numel / each / rate, 3),
                    "share_of_copy_of_this_size": round(4e-6 * numel / each / same_size, 3),
                }
                result[f"{numel} {bits} bits {name}"] = row
                print(f"  {numel:>10} {bits} bits {name}: {row}")
    return result


def _codec_calls(
    coder: NUQCodec, inputs: list[Tensor], targets: list[Tensor]
) -> dict[str, list[Callable[[], object]]]:
    payloads = [coder.encode(x, seed=0) for x in inputs]
    messages = [torch.empty_like(payload) for payload in payloads]
    return {
        "encode": [
            lambda x=x, m=m: coder.encode(x, seed=0, out=m)  # type: ignore[misc]
            for x, m in zip(inputs, messages, strict=True)
        ],
        "decode": [
            lambda p=p, t=t: coder.decode(p, t.numel(), out=t)  # type: ignore[misc]
            for p, t in zip(payloads, targets, strict=True)
        ],
    }


def operators(rate: float) -> dict[str, object]:
    """Every fused operator of a residual network alone, against the time of the bytes it has to move."""
    result: dict[str, object] = {}
    for title, operator in gpu_operators.operators(MAP, DEVICE).items():
        for name, (call, moved) in gpu_operators.passes(operator, MAP, DEVICE).items():
            limit, each = moved / rate / 1e6, in_a_row([call])
            result[f"{title}, {name}"] = {
                "limit_ms": round(limit, 4),
                "row_ms": round(each, 4),
                "ratio": round(each / limit, 3),
            }
            print(f"  {title + ', ' + name:<40} {each:8.4f} ms {each / limit:6.3f}x", flush=True)
    return result


def _step(
    model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, target: Tensor
) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> object:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(call(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def _peak(run: Callable[[], object]) -> float:
    """Megabytes that a step takes on top of what stays."""
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _kernels(run: Callable[[], object]) -> list[tuple[str, int, float]]:
    """Name, calls and milliseconds of a step's kernels, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    rows = [(e.key, e.count, e.device_time_total / 1e3) for e in seen.key_averages()]
    return sorted(rows, key=lambda row: -row[2])


def steps(rate: float, compiled: bool = True, profile: bool = False) -> dict[str, object]:
    """A ResNet-18 training step, bf16-mixed, channels-last, against torchvision's float network."""
    del rate
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=DEVICE).contiguous(memory_format=torch.channels_last)
    target = torch.randint(1000, (BATCH,), device=DEVICE)
    result: dict[str, object] = {"batch": BATCH}
    for kind, mode in KINDS.items() if compiled else (("eager", None),):
        result[kind] = _compare(mode, x, target, f"{kind} " if profile else None)
        for name, row in result[kind].items():  # type: ignore[attr-defined]
            print(f"  {kind} {name}: {row}", flush=True)
    return result


def _compare(mode: str | None, x: Tensor, target: Tensor, title: str | None) -> dict[str, dict[str, float]]:
    """Time, kernel time and memory of every network, in one way of running them."""
    makers = {
        "float": torchvision.models.resnet18,
        "W2A2": lambda: resnet18(2, 2),
        "W4A4": lambda: resnet18(4, 4),
    }
    runs: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, float]] = {}
    for name, make in makers.items():
        model = make().to(DEVICE, memory_format=torch.channels_last).train()
        began = time.perf_counter()
        runs[name] = _step(model, model if mode is None else torch.compile(model, mode=mode), x, target)
        runs[name]()
        torch.cuda.synchronize()
        rows[name] = {"first_call_s": round(time.perf_counter() - began, 1)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(4):  # in turns
        for name, run in runs.items():
            times[name].append(milliseconds(run, 6))
    for name, row in rows.items():
        kernels = _kernels(runs[name])
        row["ms"] = round(statistics.median(times[name]), 3)
        row["kernels_ms"] = round(sum(ms for *_, ms in kernels), 3)
        for figure in ("ms", "kernels_ms"):
            row[f"{figure}_ratio"] = round(row[figure] / rows["float"][figure], 3)
        if mode != "reduce-overhead":  # graphs keep their memory
            row["peak_megabytes"] = round(_peak(runs[name]), 1)
            row["peak_ratio"] = round(row["peak_megabytes"] / rows["float"]["peak_megabytes"], 3)
        if title is not None:
            print(f"== {title}{name}: kernels {row['kernels_ms']} ms")
            for key, count, ms in kernels[:30]:
                print(f"  {ms:9.3f} ms {count:5d}  {key[:90]}")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Runs the chosen topics."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    topics = {"quantizer": quantizer, "codec": codec, "operators": operators, "steps": steps}
    parser.add_argument("topics", nargs="*", help=f"any of {', '.join(topics)}; all by default")
    parser.add_argument("--no-compile", action="store_true", help="steps: eager only")
    parser.add_argument("--profile", action="store_true", help="steps: print the kernels of one step")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    chosen = parser.parse_args(argv)
    unknown = sorted(set(chosen.topics) - set(topics))
    if unknown:
        parser.error(f"topics: got {', '.join(unknown)}, allowed are {', '.join(topics)}")
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device, found none")
    torch.manual_seed(0)
    results = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    rate = copy_rate()
    print(f"copy: {rate:.0f} GB/s")
    command = " ".join(["python -m benchmarks.gpu", *(argv if argv is not None else sys.argv[1:])])
    for topic in chosen.topics or topics:
        print(f"== {topic}")
        options = {"compiled": not chosen.no_compile, "profile": chosen.profile} if topic == "steps" else {}
        figures = topics[topic](rate, **options)
        stamp = time.strftime("%Y-%m-%d", time.gmtime())
        about = {
            "machine": description(DEVICE),
            "copy_gb_per_s": round(rate),
            "command": command,
            "date": stamp,
        }
        results[topic] = {**figures, **about}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written: {chosen.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
