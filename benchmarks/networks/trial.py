"""What becomes of one network: converted, trained on two examples, resumed, exported, compared."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks.catalog import Case
from lightning_n2uq.convert import quantize_model
from lightning_n2uq.convert.report import QUANTIZED
from lightning_n2uq.export.program.explain import explain_file, explain_modules
from lightning_n2uq.export.program.onnx_program import export_program, tensors

STEPS, AFTER = 6, 2


def trial(build: Callable[[], Case]) -> dict[str, Any]:
    """Returns what was found: a value by column, and `error` where a column stopped the rest."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for part in (_converted, _trained, _exported):
                found["part"] = part.__name__[1:]
                part(build, found)
        except Exception as error:  # a network's own code may raise anything; the table says what
            text = " ".join(str(error).split())
            found["error"] = f"{found['part']}: {type(error).__name__}: {text}"[:300]
    found.pop("part")
    found.pop("case", None)
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def _converted(build: Callable[[], Case], found: dict[str, Any]) -> None:
    case = found["case"] = build()
    report = quantize_model(case.model)
    layers = list(report.layers)
    found["layers"] = len(layers)
    found["quantized"] = sum(layer.status == QUANTIZED for layer in layers)


def _trained(build: Callable[[], Case], found: dict[str, Any]) -> None:
    """Trains, keeps everything in a file, and goes on twice: at once, and from the file in a new network."""
    case: Case = found["case"]
    goal = _goal(case)
    optimizer = torch.optim.Adam(case.model.parameters(), 1e-3)
    losses = [_step(case, goal, optimizer, number) for number in range(STEPS)]
    found["loss_first"], found["loss_last"] = losses[0], losses[-1]
    file = io.BytesIO()
    torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file)
    went_on = [_step(case, goal, optimizer, STEPS + number) for number in range(AFTER)]
    torch.manual_seed(1)
    other = build()
    quantize_model(other.model)
    other.model.load_state_dict(kept["model"])
    other.arguments, other.keywords, other.targets = case.arguments, case.keywords, case.targets
    optimizer = torch.optim.Adam(other.model.parameters(), 1e-3)
    optimizer.load_state_dict(kept["optimizer"])
    resumed = [_step(other, goal, optimizer, STEPS + number) for number in range(AFTER)]
    state, expected = other.model.state_dict(), case.model.state_dict()
    same = all(torch.equal(value, state[name]) for name, value in expected.items())
    found["resumed"] = went_on == resumed and same


def _goal(case: Case) -> list[Tensor]:
    """Returns what outputs are trained towards."""
    if case.targets is not None:
        return []
    with torch.no_grad():
        outputs = [out for out in tensors(case.model.eval()(*case.arguments, **case.keywords)) if _real(out)]
    return [torch.randn(out.shape) for out in outputs]


def _step(case: Case, goal: list[Tensor], optimizer: torch.optim.Optimizer, number: int) -> float:
    torch.manual_seed(1000 + number)  # dropout
    model = case.model.train()
    optimizer.zero_grad()
    if case.targets is not None:
        losses = model(*case.arguments, [dict(target) for target in case.targets])
        loss = sum(losses.values())
    else:
        outputs = [out for out in tensors(model(*case.arguments, **case.keywords)) if _real(out)]
        loss = sum((out - wanted).square().mean() for out, wanted in zip(outputs, goal, strict=False))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss)


def _real(out: Tensor) -> bool:
    return out.is_floating_point()


def _exported(build: Callable[[], Case], found: dict[str, Any]) -> None:
    case: Case = found["case"]
    model = case.model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    program = export_program(model, *case.arguments, keywords=case.keywords)
    deployed = program.deployed
    found["integer"], found["float"] = len(deployed.integer), dict(deployed.floating)
    found["open_batch"] = program.dynamic
    for name, explanation in (
        ("file", explain_file(program)),
        ("modules", explain_modules(program, model)),
    ):
        found[name] = {
            "explained": explanation.ok,
            "free": explanation.free if math.isfinite(explanation.free) else None,  # None: other boxes
            "forced": explanation.forced,
            "moved": sum(layer.moved for layer in explanation.layers),
            "codes": sum(layer.values for layer in explanation.layers),
        }
