"""ResNet-18's evaluation as deployed (`FastNetwork`) against torchvision's float network, on the CPU.

    python -m benchmarks evaluation               # batch 8, 224x224
    python -m benchmarks evaluation --quick       # one small case, a check that it runs

All networks live in one process and take turns; a figure is the ratio within a round. Weights are random,
which has no influence on time; norms and thresholds fit random images. The float network in bfloat16 takes
part where the processor has instructions for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.export_engines import trained_network
from benchmarks.timing import summary, table, take_turns
from lightning_n2uq.export import FastNetwork, describe
from lightning_n2uq.utils import processor

BASE = "float, torchvision"
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def float_networks(images: Tensor) -> dict[str, Callable[[], object]]:
    """Torchvision's network in float32, also channels-last, and in bfloat16 where the processor has it."""
    import torchvision

    model = torchvision.models.resnet18().eval()
    last = torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)
    images_last = images.contiguous(memory_format=torch.channels_last)

    def half() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return last(images_last)

    runs: dict[str, Callable[[], object]] = {
        BASE: lambda: model(images),
        "float, channels-last": lambda: last(images_last),
    }
    return {**runs, "float, channels-last, bf16-mixed": half} if processor.writes_bfloat16() else runs


def profile(network: FastNetwork, images: Tensor, runs: int) -> dict[str, float]:
    """Milliseconds by kind of operation: the sum of every operation's fastest run."""
    from time import perf_counter

    fastest: dict[int, float] = defaultdict(lambda: float("inf"))
    kinds: dict[int, str] = {}
    for _ in range(runs):
        values = {**network.plan.constants, network.description.input.name: images}
        for index, operation in enumerate(network.plan.operations):
            begin = perf_counter()
            operation.run(values)
            fastest[index] = min(fastest[index], 1e3 * (perf_counter() - begin))
            kinds[index] = operation.kind
            for name in operation.frees:
                del values[name]
    total: dict[str, float] = defaultdict(float)
    for index, milliseconds in fastest.items():
        total[kinds[index]] += milliseconds
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return {"all": round(sum(total.values()), 2), **{kind: round(value, 2) for kind, value in ordered}}


def run(device: torch.device, seconds: float, batch: int = 8, size: int = 224) -> dict[str, object]:
    """The topic; always on the CPU, whatever the device."""
    images = torch.randn(batch, 3, size, size)
    networks: dict[str, nn.Module] = {
        name: FastNetwork(describe(trained_network(bits, size), (3, size, size)))
        for name, bits in (("W2A2", 2), ("W4A4", 4))
    }
    runs = float_networks(images)
    runs.update({name: (lambda network=network: network(images)) for name, network in networks.items()})  # type: ignore[misc]
    with torch.no_grad():
        # At least 15 rounds, however long they take.
        turns = take_turns(runs, seconds, torch.device("cpu"), rounds=1000, least=15 if seconds > 1 else 3)
        figures = summary(turns, BASE)
        title = (
            f"ResNet-18 evaluation, {batch} x {size}x{size}, fp32, CPU, threads: {torch.get_num_threads()}"
        )
        print(table(title, figures))
        profiles = {name: profile(network, images, 5) for name, network in networks.items()}  # type: ignore[arg-type]
    for name, parts in profiles.items():
        print(
            f"  {name}, fastest runs in ms: " + ", ".join(f"{kind} {value}" for kind, value in parts.items())
        )
    flags = sorted(processor.flags() & set(_FLAGS))
    print(f"  processor flags: {', '.join(flags) or 'unknown'}")
    return {"batch": batch, "size": size, "flags": flags, "time": figures, "profile_ms": profiles}
