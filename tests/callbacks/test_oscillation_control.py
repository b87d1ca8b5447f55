"""Oscillating weights: counted as the paper counts, frozen where they were most, dampened, resumed."""

import csv

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny_training import TinyModule, loader, trainer

from lightning_n2uq.callbacks import OscillationControl, ThresholdAnnealing
from lightning_n2uq.callbacks._oscillation.tracker import OscillationTracker
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.quantizers.integers import weight_integers

METHODS = {
    "n2uq": 2,
    "lsq": 3,
    "lsq_plus": 4,
    "statsq": 2,
    "least_error": 2,
    "seq": 2,
    "seq_ternary": 2,
    "binary": 1,
}
ENDS = {
    "n2uq": 3,
    "lsq": (-4, 3),
    "lsq_plus": (-8, 7),
    "statsq": 3,
    "least_error": 3,
    "seq": 3,
    "seq_ternary": 1,
    "binary": 1,
}


def walk(steps, seed=0):
    """Level indices of 40 weights that stay, wander or flip, some of them often."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.linspace(0, 1, 40)
    levels = [torch.randint(0, 4, (40,), generator=generator)]
    for _ in range(steps):
        moves = (torch.rand(40, generator=generator) < chance) * torch.randint(
            -1, 2, (40,), generator=generator
        )
        levels.append((levels[-1] + moves).clamp(0, 3))
    return [one.to(torch.uint8) for one in levels]


def one_weight(levels, momentum, threshold):
    """The paper's algorithm for a single weight in plain Python."""
    last, direction, frequency, mean, frozen = levels[0], 0, 0.0, float(levels[0]), False
    for new in levels[1:]:
        now = last if frozen else new
        change = (now > last) - (now < last)
        frequency += momentum * ((change != 0 and change == -direction) - frequency)
        mean += momentum * (now - mean)
        direction = change or direction
        last = now
        if threshold is not None and frequency > threshold and not frozen:
            between = sorted((last, last - direction))
            last, frozen = round(min(max(mean, between[0]), between[1])), True
            frequency = 0.0
    return last, direction, frequency, mean, frozen


@pytest.mark.parametrize("threshold", [None, 0.15])
def test_a_tracker_does_for_every_weight_what_the_algorithm_does_for_one(threshold):
    levels = walk(300)
    tracker = OscillationTracker(levels[0], 4)
    for now in levels[1:]:
        tracker.update(now, 0.05, threshold)
    expected = [one_weight([int(x[i]) for x in levels], 0.05, threshold) for i in range(40)]
    last, direction, frequency, mean, frozen = zip(*expected, strict=True)
    assert tracker.levels.tolist() == list(last)
    assert tracker.direction.tolist() == list(direction)
    torch.testing.assert_close(tracker.frequency, torch.tensor(frequency), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tracker.mean, torch.tensor(mean), rtol=1e-4, atol=1e-5)
    assert tracker.frozen.tolist() == list(frozen)
    assert sum(frozen) in ((0,) if threshold is None else range(5, 36))


def test_a_weight_that_flips_between_two_levels_freezes_on_the_one_where_it_was_longer():
    tracker = OscillationTracker(torch.zeros(1, dtype=torch.uint8), 4)
    for i in range(200):
        tracker.update(
            torch.tensor([2 if i % 4 == 0 else 1], dtype=torch.uint8), 0.02, 0.3 if i > 100 else None
        )
    assert tracker.frozen.item()
    assert tracker.levels.item() == 1


def levels_of(module):
    return module.net[0].weight_quantizer.codes(module.net[0].weight.detach())


class _Levels(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append(levels_of(pl_module))


@pytest.mark.parametrize("method", METHODS)
def test_frozen_weights_keep_their_level_while_the_others_learn(tmp_path, method):
    callback = OscillationControl(0.1, 0.1, momentum=0.05, start=0, log_every_n_steps=1)
    module, levels = TinyModule(spec=QuantSpec(METHODS[method], 4, method, "lsq")), _Levels()
    runner = trainer(tmp_path, [callback, levels], max_epochs=4)
    tracked = []

    class Freeze(Callback):
        """Shakes every third weight of the first layer across a threshold until it is frozen."""

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight, step = pl_module.net[0].weight, trainer.global_step
            with torch.no_grad():
                weight[::3] = weight[::3].abs().clamp_min(0.5) * (-1) ** step
            tracker = callback._trackers.get("0")
            tracked.append(None if tracker is None else tracker.frozen.clone())

    runner.callbacks.insert(0, Freeze())
    runner.fit(module, loader(), loader())
    first = next(i for i, mask in enumerate(tracked) if mask is not None and mask[::3].all())
    assert first < len(tracked) - 10
    mask = tracked[first]
    assert not mask.all()
    kept = levels.seen[first - 1][mask]
    for seen in levels.seen[first:]:
        assert torch.equal(seen[mask], kept)


@pytest.mark.parametrize("method", ["n2uq", "least_error", "lsq", "seq"])
def test_a_layer_of_frozen_weights_stands_still(tmp_path, method):
    """A scale computed from the weights would grow or shrink if they were written onto their levels."""
    callback = OscillationControl(0.5, 0.5, start=0)
    module = TinyModule(spec=QuantSpec(METHODS[method], 4, method, "lsq"), optimizer="adam")
    seen = []

    class Freeze(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            tracker = callback._trackers["0"]
            if not tracker.any_frozen:
                tracker.any_frozen = bool(tracker.frozen.fill_(True).all())
                callback._held["0"] = pl_module.net[0].weight.detach().clone()
            seen.append((levels_of(pl_module), pl_module.net[0].weight.detach().clone()))

    trainer(tmp_path, [callback, Freeze()], max_epochs=10).fit(module, loader(), loader())
    for levels, weight in seen[1:]:
        assert torch.equal(levels, seen[0][0])
        if not method.startswith(("lsq", "seq")):  # a learned scale moves, and weights with it
            assert torch.equal(weight, seen[0][1])
    assert not torch.equal(module.net[2].weight, TinyModule().net[2].weight)


def test_nothing_changes_where_nothing_oscillates(tmp_path):
    ours, plain = TinyModule(), TinyModule()
    trainer(tmp_path, [OscillationControl(1.0, 0.5, momentum=0.01)]).fit(ours, loader(), loader())
    trainer(tmp_path).fit(plain, loader(), loader())
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_threshold_falls_and_the_dampening_rises_along_a_cosine(tmp_path):
    callback = OscillationControl(0.1, 0.02, dampening=0.4, start=0.25)
    trainer(tmp_path, [callback]).fit(TinyModule(), loader(), loader())  # 16 steps
    assert [callback.threshold(i) for i in (0, 4, 16)] == pytest.approx([0.1, 0.1, 0.02])
    assert callback.threshold(10) == pytest.approx(0.06)
    assert [callback.dampening_at(i) for i in (0, 4, 10, 16)] == pytest.approx([0, 0, 0.2, 0.4])


@pytest.mark.parametrize("method", METHODS)
def test_the_dampening_is_the_papers_loss_and_its_gradient_leads_to_the_nearest_level(tmp_path, method):
    module = TinyModule(spec=QuantSpec(METHODS[method], 4, method, "lsq"))
    trainer(tmp_path).fit(module, loader(), loader())
    callback = OscillationControl(dampening=1.0)
    callback.setup(trainer(tmp_path), module, "fit")
    expected = 0.0
    weights = [layer.weight for layer in (module.net[0], module.net[2])]
    for layer in (module.net[0], module.net[2]):
        quantized = layer.weight_quantizer.eval()(layer.weight).detach().double()
        quantizer = layer.weight_quantizer
        scale = weight_integers(quantizer, layer.weight).scale[:, None]
        ends = ENDS[method]
        low, high = (scale * end for end in (ends if isinstance(ends, tuple) else (-ends, ends)))
        expected += (quantized - layer.weight.detach().double().clamp(low, high)).square().sum()
    value = callback.penalty()
    callback.teardown(None, module, "fit")
    torch.testing.assert_close(value.double().detach(), expected, rtol=1e-4, atol=1e-6)
    for weight, gradient in zip(weights, torch.autograd.grad(value, weights), strict=True):
        layer = module.net[0] if weight is module.net[0].weight else module.net[2]
        distance = 2 * (weight - layer.weight_quantizer(weight)).detach()
        inside = gradient != 0
        assert inside.float().mean() > 0.2
        torch.testing.assert_close(gradient[inside], distance[inside], rtol=1e-3, atol=1e-5)


def test_dampening_pulls_weights_to_their_levels_in_training(tmp_path):
    def distance(callbacks):
        module = TinyModule()
        trainer(tmp_path, callbacks, max_epochs=6).fit(module, loader(), loader())
        weight = module.net[0].weight.detach()
        return (weight - module.net[0].weight_quantizer(weight)).abs().mean() / weight.abs().mean()

    damped = distance([OscillationControl(None, dampening=2.0, start=0)])
    assert damped < 0.6 * distance([])


@pytest.mark.parametrize("every", ["epoch", "step"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, every):
    def fit(ckpt_path=None, **length):
        module = TinyModule()
        options = {"momentum": 0.01, "start": 2, "end": 30, "unit": "steps", "dampening": 0.1}
        callback = OscillationControl(0.02, 0.02, **options)
        runner = trainer(tmp_path, [callback, Shake()], **length)
        runner.fit(module, loader(), loader(), ckpt_path=ckpt_path)
        return runner, module, callback

    class Shake(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with torch.no_grad():
                pl_module.net[0].weight[::2] *= -1

    _, whole, known = fit(max_epochs=4)
    part = {"max_epochs": 2} if every == "epoch" else {"max_epochs": 4, "max_steps": 16}
    fit(**part)[0].save_checkpoint(tmp_path / "a.ckpt")
    _, resumed, again = fit(str(tmp_path / "a.ckpt"), max_epochs=4)
    assert known._trackers["0"].frozen.any()
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, state in known.state_dict()["layers"].items():
        for key, value in again.state_dict()["layers"][name].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(state[key]))


def test_shares_are_logged(tmp_path):
    callback = OscillationControl(0.3, 0.3, momentum=0.1, start=0, dampening=0.1, log_every_n_steps=4)
    logger = CSVLogger(tmp_path, "", "")

    class Shake(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            with torch.no_grad():
                pl_module.net[0].weight[:8] *= -1

    trainer(tmp_path, [callback, Shake()], logger=logger, log_every_n_steps=1).fit(
        TinyModule(), loader(), loader()
    )
    with open(tmp_path / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["oscillation/frozen"]]
    assert [int(row["step"]) for row in rows] == [0, 3, 7, 11, 15]
    assert float(rows[0]["oscillation/0/oscillating"]) == 0
    assert float(rows[1]["oscillation/0/oscillating"]) > 0.4
    last = rows[-1]
    assert float(last["oscillation/0/frozen"]) == pytest.approx(0.5, abs=0.1)
    count = 8 * 16 + 16 * 4
    shares = 8 * 16 * float(last["oscillation/0/frozen"]) + 16 * 4 * float(last["oscillation/2/frozen"])
    assert float(last["oscillation/frozen"]) == pytest.approx(shares / count)
    assert float(last["oscillation/freeze_above"]) == pytest.approx(0.3)
    assert float(last["oscillation/dampening"]) > 0


def test_another_width_starts_anew(tmp_path):
    callback = OscillationControl(0.02, 0.02, momentum=0.01, start=0)
    narrowing = ThresholdAnnealing(0, 0.25, bits=(4, 2), bits_at=(0, 0.5))
    trainer(tmp_path, [narrowing, callback]).fit(TinyModule(), loader(), loader())
    assert {tracker.num_levels for tracker in callback._trackers.values()} == {4}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"start": 0.6, "end": 0.5}, "start: got 0.6, allowed is at most end"),
        ({"freeze_above": 0.005}, "freeze_above: got 0.005, allowed is 0.01 to 1"),
        ({"freeze_above_end": 0}, "freeze_above_end: got 0, allowed is above 0"),
        ({"momentum": 0.009}, "momentum: got 0.009, allowed is at most half of freeze_above_end, 0.005"),
        ({"dampening": -1}, "dampening: got -1, allowed is 0 or more"),
        ({"log_every_n_steps": 0}, "log_every_n_steps: got 0"),
    ],
)
def test_impossible_values_are_named(options, line):
    with pytest.raises(ValueError, match=line):
        OscillationControl(**options)


@pytest.mark.parametrize("method", ["apot", "nulsq", "lcq", "dorefa", "ternary"])
def test_methods_without_nearest_even_levels_are_refused(tmp_path, method):
    with pytest.raises(ValueError, match="none of the chosen layers has weights on the nearest of evenly"):
        trainer(tmp_path, [OscillationControl()]).fit(
            TinyModule(spec=QuantSpec(2, 2, method, "lsq")), loader(), loader()
        )
