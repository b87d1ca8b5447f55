"""First values come from training data with spread, never from a look; the buffer says whether they did."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.convert.calibrated import CalibratedInput
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import UniformGrid, activation_quantizer, weight_quantizer
from lightning_n2uq.quantizers.base import DataInitializedQuantizer
from lightning_n2uq.quantizers.looks import looking
from lightning_n2uq.quantizers.positions import level_position
from lightning_n2uq.summary import summarize

BUILDERS = {
    "lsq": lambda: activation_quantizer("lsq", 2),
    "lsq_plus": lambda: activation_quantizer("lsq_plus", 2),
    "lsq weights": lambda: weight_quantizer("lsq", 2),
    "lsq_plus weights": lambda: weight_quantizer("lsq_plus", 2),
    "grid": lambda: UniformGrid(8),
    "calibrated": lambda: converted("n2uq")[1].activation_quantizer,
    "calibrated lsq": lambda: converted("lsq")[1].activation_quantizer,
}


def converted(method: str) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    quantize_model(net, {"activation_quantizer": method, "weight_quantizer": "lsq"})
    return net


def fitted(model: nn.Module) -> list[bool]:
    return [bool(m.initialized) for m in model.modules() if isinstance(m, DataInitializedQuantizer)]


@pytest.mark.parametrize(
    "data",
    [torch.zeros(4, 3), torch.full((4, 3), 0.7), torch.zeros(0, 3)],
    ids=["zeros", "constant", "empty"],
)
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_batch_without_spread_puts_the_fit_off_and_says_so(build, data: torch.Tensor) -> None:
    quantizer, twin = build(), build()
    before = [p.clone() for p in quantizer.parameters()]
    with pytest.warns(UserWarning, match="the batch has no spread"):
        y = quantizer(data.clone().requires_grad_())
    assert torch.isfinite(y).all()
    y.sum().backward()
    assert not any(fitted(quantizer))
    for ours, old in zip(quantizer.parameters(), before, strict=True):
        assert torch.equal(ours, old)
        assert ours.grad is not None  # data-parallel training waits for it
        assert not ours.grad.any()
    real = torch.rand(16, 3)
    assert torch.equal(quantizer(real), twin(real))
    assert all(fitted(quantizer))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_a_frozen_quantizer_lets_a_batch_without_spread_through(build) -> None:
    quantizer = build().requires_grad_(False)
    with pytest.warns(UserWarning, match="the batch has no spread"):
        assert torch.isfinite(quantizer(torch.zeros(4, 3))).all()


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_what_torch_traces_fits_nothing(build) -> None:
    quantizer = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(quantizer, torch.rand(4, 3), check_trace=False)
        if isinstance(quantizer, CalibratedInput):
            with pytest.raises(ValueError, match="CalibratedInput: got no data yet"):
                torch.export.export(quantizer, (torch.rand(4, 3),))
        else:
            torch.export.export(quantizer, (torch.rand(4, 3),))
    with looking():
        quantizer(torch.rand(4, 3))
    assert not any(fitted(quantizer))


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "grid"])
def test_a_question_fits_nothing(name: str) -> None:
    quantizer = BUILDERS[name]()
    quantizer.codes(torch.rand(4, 3))
    level_position(quantizer, torch.rand(4, 3))
    assert not quantizer.initialized


@pytest.mark.integration
@pytest.mark.parametrize("method", ["lsq", "lsq_plus"])
@pytest.mark.parametrize("backbone", ["resnet20", "torchvision/resnet18"])
def test_looks_at_a_classifier_leave_it_as_it_was(method: str, backbone: str) -> None:
    model = QuantizedClassifier(
        backbone, image_size=8, activation_quantizer=method, weight_quantizer=method, num_classes=4
    )
    for value in model.parameters():
        if value.ndim == 1:
            nn.init.uniform_(value, 0.1, 0.5)  # biases give constant images a spread further in
    for mode in (True, False):
        model.train(mode)
        model(model.example_input_array)
        model(model.example_input_array.clone())
        model(torch.full((3, 3, 8, 8), 0.4))
    summarize(model, (3, 8, 8))
    model.train()
    assert not any(fitted(model))
    model(torch.randn(4, 3, 8, 8))
    assert all(fitted(model))


@pytest.mark.integration
@pytest.mark.parametrize("mode", [True, False])
def test_looks_at_a_classifier_search_no_range_in_either_mode(mode: bool, monkeypatch) -> None:
    searched: list[torch.Tensor] = []
    original = CalibratedInput.range_of
    monkeypatch.setattr(CalibratedInput, "range_of", lambda self, x: searched.append(x) or original(self, x))
    model = QuantizedClassifier("torchvision/resnet18", image_size=8, num_classes=4).train(mode)
    model(model.example_input_array)
    model(model.example_input_array.clone())
    summarize(model, (3, 8, 8))
    assert not searched
    model.train(mode)(torch.randn(4, 3, 8, 8))
    assert searched


@pytest.mark.integration
def test_training_after_a_look_is_training_without_one() -> None:
    def trained(look: bool) -> list[torch.Tensor]:
        torch.manual_seed(2)
        model = QuantizedClassifier(
            image_size=8, activation_quantizer="lsq", weight_quantizer="lsq", num_classes=4
        )
        before = copy.deepcopy(model)
        if look:
            model(model.example_input_array)
            for ours, theirs in zip(model.modules(), before.modules(), strict=True):
                if isinstance(ours, nn.BatchNorm2d):
                    ours.load_state_dict(theirs.state_dict())  # running statistics move in every look
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(False), trained(True), strict=True))


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
def test_copies_taken_before_the_first_batch_agree_with_their_buffer(build) -> None:
    quantizer = build()
    average = AveragedModel(quantizer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    deep = copy.deepcopy(quantizer)
    quantizer(torch.rand(64, 3) * 5)
    with torch.no_grad():
        average.update_parameters(quantizer)
        for ours, theirs in zip(deep.buffers(), quantizer.buffers(), strict=True):
            ours.data.copy_(theirs.data)  # as a swap of averaged weights does
        for ours, theirs in zip(deep.parameters(), quantizer.parameters(), strict=True):
            ours.data.copy_(theirs.data)
    x = torch.rand(32, 3)
    for twin in (average.module, deep):
        assert torch.equal(twin.eval()(x), quantizer.eval()(x))
        values = [p.clone() for p in twin.parameters()]
        twin.train()(torch.rand(32, 3) * 100)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), values, strict=True))


def test_a_buffer_set_back_is_believed() -> None:
    quantizer = activation_quantizer("lsq", 2)
    quantizer(torch.rand(64))
    quantizer.initialized.data.fill_(False)
    quantizer(torch.rand(64) * 100)
    assert quantizer.step.item() > 1
    saved = io.BytesIO()
    torch.save(quantizer.state_dict(), saved)
    saved.seek(0)
    other = activation_quantizer("lsq", 2)
    other.load_state_dict(torch.load(saved), assign=True)
    assert other.fitted
