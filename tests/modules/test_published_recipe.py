import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lightning_n2uq import backbones
from lightning_n2uq.interop import load_official_checkpoint
from lightning_n2uq.modules.published import (
    published_parameter_groups,
    published_schedule_factor,
    set_numerics,
)

sys.path.append(str(Path(__file__).parents[1] / "interop"))
from published_format import PublishedNetwork

LR, DECAY = 1.25e-3, 1e-4


def published_optimizer(parameters, third=False):
    slow_parts = ["quan1.a", "quan2.a", "scale", "start"] + ["quan3.a"] * third
    slow = {k for k in parameters if any(part in k for part in slow_parts)}
    weights = {k for k, p in parameters.items() if p.dim() == 4 and "bias" not in k}
    rest = parameters.keys() - slow - weights
    return torch.optim.Adam(
        [
            {"params": [parameters[k] for k in sorted(slow)], "lr": LR / 10},
            {"params": [parameters[k] for k in sorted(rest)], "lr": LR},
            {"params": [parameters[k] for k in sorted(weights)], "lr": LR, "weight_decay": DECAY},
        ]
    )


@pytest.mark.integration
@pytest.mark.parametrize(("arch", "bits", "steps"), [("resnet18", 2, 6), ("mobilenet_v2", 4, 1)])
def test_training_runs_like_the_published_code(arch, bits, steps):
    published = PublishedNetwork(arch, bits)
    model = backbones.build(arch, weight_bits=bits, activation_bits=bits, num_classes=7)
    load_official_checkpoint(published.state, model)
    model.double().train()
    set_numerics(model, pact_gradient="published")
    parameters = published.learn()
    theirs = published_optimizer(parameters, third=arch == "mobilenet_v2")
    ours = torch.optim.Adam(published_parameter_groups(model, LR, DECAY))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
        target = (torch.randn(4, 7, dtype=torch.float64, generator=generator) * 3).softmax(-1)
        expected = -(target * published(images).log_softmax(-1)).sum(-1).mean()
        loss = F.cross_entropy(model(images), target)
        for value, optimizer in ((expected, theirs), (loss, ours)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-7)


def names_at(groups, model, group):
    members = {id(p) for p in next(g for g in groups if g["name"] == group)["params"]}
    return {name for name, p in model.named_parameters() if id(p) in members}


def test_groups_miss_the_widths_that_the_published_filter_misses():
    model = backbones.resnet50(2, 2)
    groups = published_parameter_groups(model, 1.0, 0.5)
    slow, rest = (names_at(groups, model, g) for g in ("quantizer", "rest"))
    assert "layer1.0.conv1.activation_quantizer.widths" in slow
    assert "layer1.0.conv3.activation_quantizer.widths" in rest
    assert "layer1.0.conv3.activation_quantizer.start" in slow
    assert "layer1.0.downsample.0.activation_quantizer.widths" in rest
    assert "layer1.0.downsample.0.activation_quantizer.scale_in" in slow
    assert "fc.weight" in rest
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("quantizer", 0.1, 0.0),
        ("rest", 1.0, 0.0),
        ("weights", 1.0, 0.5),
    ]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_groups_of_mobilenet_take_the_third_widths_too():
    model = backbones.mobilenet_v2()
    slow = names_at(published_parameter_groups(model, 1.0, 0.0), model, "quantizer")
    assert "features.1.conv3.activation_quantizer.widths" in slow
    assert "features.18.conv1.activation_quantizer.clip" not in slow


def test_schedule_steps_before_each_epoch():
    factor = published_schedule_factor(total_steps=8, epochs=4)
    assert [factor(step) for step in range(9)] == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.0, 0.0, 0.0]
    for total_steps, epochs in ((float("inf"), 3), (10, None), (10, 0)):
        with pytest.raises(ValueError, match="max_epochs"):
            published_schedule_factor(total_steps, epochs)


def test_comparison_switch_moves_ties_only():
    model = backbones.resnet20(2, 2, width=4).eval()
    quantizer = model.layer1[0].conv1.activation_quantizer
    ties = quantizer.thresholds().detach()
    others = torch.randn(200, generator=torch.Generator().manual_seed(0))
    strict = quantizer.codes(others)
    assert quantizer.codes(ties).tolist() == [0, 1, 2]
    set_numerics(model, threshold_comparison=">=")
    assert quantizer.codes(ties).tolist() == [1, 2, 3]
    assert torch.equal(quantizer(ties), quantizer.levels()[1:])
    assert torch.equal(quantizer.codes(others), strict)
    assert (quantizer.thresholds() < ties).all()
    images = torch.randn(2, 3, 8, 8)
    inclusive = model.train()(images)  # the fused path knows only the strict comparison
    set_numerics(model)
    torch.testing.assert_close(model(images), inclusive)


def test_inclusive_comparison_keeps_the_gradients():
    x = torch.randn(64, dtype=torch.float64)
    grads = []
    for comparison in (">", ">="):
        quantizer = backbones.resnet20(2, 2, width=4).layer1[0].conv1.activation_quantizer.double()
        quantizer.comparison = comparison
        leaf = x.clone().requires_grad_()
        quantizer(leaf).pow(2).sum().backward()
        grads.append([leaf.grad, *(p.grad for p in quantizer.parameters())])
    for strict, inclusive in zip(*grads, strict=True):
        torch.testing.assert_close(strict, inclusive)


def test_numerics_reach_every_quantizer():
    model = backbones.mobilenet_v2()
    set_numerics(model, weight_gradient="straight_through", pact_gradient="published")
    assert model.features[1].conv1.weight_quantizer.gradient == "straight_through"
    assert model.features[18].conv1.activation_quantizer.gradient == "published"
    with pytest.raises(ValueError, match="threshold_comparison: got '<'"):
        set_numerics(model, threshold_comparison="<")
    with pytest.raises(ValueError, match="published format"):
        published_parameter_groups(torch.nn.Linear(1, 1), 1.0, 0.0)
