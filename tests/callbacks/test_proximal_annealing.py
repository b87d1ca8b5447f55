"""PARQ: the map of the paper, its schedule in training, its gradient, resume, and that evaluation is hard."""

import copy
import itertools

import pytest
import torch
from tiny_training import TinyModule, loader, trainer
from torch import nn

from lightning_n2uq.callbacks import ProximalAnnealing
from lightning_n2uq.callbacks._annealing.pulling import Pull
from lightning_n2uq.callbacks.proximal_annealing import inverse_slope
from lightning_n2uq.layers import QuantConv2d, QuantSpec
from lightning_n2uq.quantizers import weight_quantizer

METHODS = {
    "n2uq": 2,
    "lsq": 3,
    "lsq_plus": 2,
    "statsq": 2,
    "least_error": 3,
    "seq": 2,
    "seq_ternary": 2,
    "binary": 1,
}
PARQ = QuantSpec(2, 2, "statsq", "lsq")


def mapped(weight, levels, rho):
    """The piecewise-affine map between sorted levels, as the paper draws it; constant beyond them."""
    index = torch.searchsorted(levels, weight)
    low, high = levels[(index - 1).clamp_min(0)], levels[index.clamp_max(len(levels) - 1)]
    center = (low + high) / 2
    return torch.maximum(torch.minimum(center + (weight - center) / rho, high), low)


@pytest.mark.parametrize("rho", [1.0, 0.6, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_the_value_is_the_papers_map_and_the_gradient_the_quantizers(method, rho):
    torch.manual_seed(0)
    quantizer = weight_quantizer(method, METHODS[method])
    weight = torch.randn(1, 4000).requires_grad_()
    hard = quantizer(weight)
    (wanted,) = torch.autograd.grad((hard * torch.arange(4000.0)).sum(), weight)
    pull = Pull()
    pull.inverse_slope = rho
    hook = quantizer.register_forward_hook(pull)
    soft = quantizer(weight)
    expected = mapped(weight.detach(), hard.detach().unique(), rho)
    torch.testing.assert_close(soft.detach(), expected, rtol=1e-5, atol=1e-5)
    (found,) = torch.autograd.grad((soft * torch.arange(4000.0)).sum(), weight)
    assert torch.equal(found, wanted)
    assert torch.equal(quantizer.eval()(weight), hard)
    pull.inverse_slope = 0.0
    torch.testing.assert_close(quantizer.train()(weight), hard)
    hook.remove()


def test_the_curve_falls_from_one_to_zero():
    values = [inverse_slope(i / 10, 10.0) for i in range(11)]
    assert values[0] == pytest.approx(1)
    assert values[-1] == pytest.approx(0)
    assert values[5] == pytest.approx(0.5)
    assert all(a > b for a, b in itertools.pairwise(values))


class _Slopes(ProximalAnnealing):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def on_train_batch_start(self, *args):
        super().on_train_batch_start(*args)
        self.seen.append((self._pull.inverse_slope, len(self._hooks)))


def test_weights_are_pulled_in_training_and_free_of_hooks_afterwards(tmp_path):
    callback, module = _Slopes(0.25, 0.75), TinyModule(spec=PARQ)
    trainer(tmp_path, [callback]).fit(module, loader(), loader())  # 16 steps
    slopes = [slope for slope, _ in callback.seen]
    assert slopes[:5] == [1.0] * 5
    assert slopes[12:] == [0.0] * 4
    assert all(a > b for a, b in itertools.pairwise(slopes[4:13]))
    assert [hooks for _, hooks in callback.seen] == [2] * 12 + [0] * 4
    assert not any(m._forward_hooks for m in module.modules())


def test_training_differs_while_pulled_and_weights_land_on_levels(tmp_path):
    with_callback, without = TinyModule(spec=PARQ), TinyModule(spec=PARQ)
    trainer(tmp_path, [ProximalAnnealing()]).fit(with_callback, loader(), loader())
    trainer(tmp_path).fit(without, loader(), loader())
    assert not torch.equal(with_callback.net[0].weight, without.net[0].weight)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    def fit(epochs, ckpt_path=None):
        module = TinyModule(spec=PARQ)
        runner = trainer(tmp_path, [ProximalAnnealing(2, 12, "steps")], max_epochs=epochs)
        runner.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return runner, module

    _, whole = fit(2)
    fit(1)[0].save_checkpoint(tmp_path / "a.ckpt")
    _, resumed = fit(2, str(tmp_path / "a.ckpt"))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_convolutions_do_not_pass_by_the_hook_on_integers(monkeypatch):
    from lightning_n2uq.layers import integer

    monkeypatch.setattr(integer, "FEWEST", 0)
    torch.manual_seed(0)
    conv = QuantConv2d(8, 8, 3, padding=1, spec=QuantSpec(2, 2, "lsq", "lsq")).train()
    x = torch.rand(2, 8, 9, 9)
    hard = conv(x)
    twin = copy.deepcopy(conv)
    pull = Pull()  # inverse slope 1: the weights as they are, within the levels
    conv.weight_quantizer.register_forward_hook(pull)
    weight = twin.weight_quantizer(twin.weight)
    assert not torch.allclose(conv(x), hard)
    wanted = nn.functional.conv2d(
        twin.activation_quantizer(x), mapped(twin.weight, weight.detach().unique(), 1.0), twin.bias, padding=1
    )
    torch.testing.assert_close(conv(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"start": 0.6, "end": 0.5}, "start: got 0.6, allowed is at most end"),
        ({"unit": "days"}, "unit: got 'days'"),
        ({"steepness": 0}, "steepness: got 0, allowed is a positive number"),
    ],
)
def test_impossible_values_are_named(options, line):
    with pytest.raises(ValueError, match=line):
        ProximalAnnealing(**options)


@pytest.mark.parametrize("method", ["apot", "nulsq", "lcq", "dorefa", "ternary"])
def test_methods_without_nearest_even_levels_are_refused(tmp_path, method):
    with pytest.raises(ValueError, match="none of the chosen layers has weights on the nearest of evenly"):
        trainer(tmp_path, [ProximalAnnealing()]).fit(
            TinyModule(spec=QuantSpec(2, 2, method, "lsq")), loader(), loader()
        )
