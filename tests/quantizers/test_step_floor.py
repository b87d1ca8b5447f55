"""Steps and clips at zero or below: bounded, with a gradient that lets them rise, and named by the guard."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_n2uq.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import activation_quantizer, weight_quantizer
from lightning_n2uq.quantizers.base import STEP_FLOOR

BOUNDED = [("lsq", "step"), ("lsq_plus", "step"), ("pact", "clip"), ("apot", "clip")]
WEIGHTS = [("lsq", "step"), ("lsq_plus", "step"), ("apot", "clip")]
CASES = [(activation_quantizer, *c) for c in BOUNDED] + [(weight_quantizer, *c) for c in WEIGHTS]


def quantizer_at(build, name: str, parameter: str, value: float) -> nn.Module:
    quantizer = build(name, 3)
    quantizer(torch.rand(64, 4))
    with torch.no_grad():
        quantizer.get_parameter(parameter).fill_(value)
    return quantizer


@pytest.mark.parametrize("value", [0.0, -0.3, 1e-12])
@pytest.mark.parametrize(("build", "name", "parameter"), CASES)
def test_a_step_at_zero_or_below_counts_as_the_floor_and_can_rise(build, name, parameter, value) -> None:
    quantizer, twin = (quantizer_at(build, name, parameter, v) for v in (value, STEP_FLOOR))
    with torch.no_grad():
        for (key, ours), theirs in zip(quantizer.named_parameters(), twin.parameters(), strict=True):
            if key != parameter:
                theirs.copy_(ours)
    x = torch.rand(32, 4, generator=torch.Generator().manual_seed(3)) + 0.1
    y = quantizer(x)
    assert torch.isfinite(y).all()
    assert torch.equal(y, twin(x))
    assert torch.equal(quantizer.codes(x), twin.codes(x))
    y.sum().backward()
    twin(x).sum().backward()
    found = quantizer.get_parameter(parameter).grad
    assert found.item() != 0
    assert torch.equal(found, twin.get_parameter(parameter).grad)


@pytest.mark.parametrize(("build", "name", "parameter"), CASES)
def test_a_negative_step_learns_its_way_back(build, name, parameter) -> None:
    quantizer = quantizer_at(build, name, parameter, -0.02)
    optimizer = torch.optim.Adam([quantizer.get_parameter(parameter)], 0.02)
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(1))
    x = x if build is weight_quantizer else x.abs()
    for _ in range(50):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert quantizer.get_parameter(parameter).item() > 0.05


def test_an_unbounded_value_is_what_it_was() -> None:
    quantizer = quantizer_at(activation_quantizer, "lsq", "step", 0.25)
    x = torch.rand(100) * 3
    assert torch.equal(quantizer(x), (x / 0.25).clamp(0, 7).round() * 0.25)
    with torch.no_grad():
        quantizer.step.fill_(float("nan"))
    assert quantizer(x).isnan().all()


@pytest.mark.parametrize(("method", "parameter"), BOUNDED)
def test_training_with_negative_steps_stays_finite_in_every_path(method: str, parameter: str) -> None:
    weights = method if method != "pact" else "n2uq"
    model = QuantizedClassifier(
        image_size=8, in_channels=1, activation_quantizer=method, weight_quantizer=weights
    )
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    model(images)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(f"quantizer.{parameter}"):
                value.neg_()
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    assert torch.isfinite(model.eval()(images)).all()


def judged(model: nn.Module, **actions: str) -> NonFiniteGuard:
    class _Trainer:
        global_step, world_size, training = 7, 1, True

    guard = NonFiniteGuard(**actions)
    guard._judge_state(_Trainer(), model)
    return guard


def test_the_guard_names_steps_at_or_below_zero() -> None:
    model = nn.Sequential(
        quantizer_at(activation_quantizer, "lsq", "step", -0.01),
        quantizer_at(activation_quantizer, "pact", "clip", 0.0),
        quantizer_at(activation_quantizer, "n2uq", "scale_out", 0.0),
        quantizer_at(activation_quantizer, "apot", "clip", 0.5),
    )
    line = r"step 7: steps, clips or scales .*: 0.step \(-0.01\), 1.clip \(0\), 2.scale_out \(0\) \(warn"
    with pytest.warns(UserWarning, match=line):
        assert judged(model).counts == {"scale": 1}
    with pytest.raises(NonFiniteError, match="NonFiniteGuard's scale: stop"):
        judged(model, scale="stop")
    assert not judged(model[3:]).counts
