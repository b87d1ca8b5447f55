import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from tiny_training import TinyModule, loader, trainer
from torch.amp import GradScaler

from lightning_n2uq.callbacks import EntropyRegularizer
from lightning_n2uq.callbacks._common.loss_terms import attach_loss_term
from lightning_n2uq.callbacks._common.quantized_layers import quantized_layers
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.ops.entropy import entropy_bits, hard_histogram, soft_histogram
from lightning_n2uq.quantizers import (
    ACTIVATION_QUANTIZERS,
    WEIGHT_QUANTIZERS,
    EntropyPreservingWeightQuantizer,
    allowed_bits,
)
from lightning_n2uq.quantizers.positions import level_position


def hard_entropy(quantizer, x):
    return float(entropy_bits(hard_histogram(quantizer.codes(x), quantizer.num_levels)))


CASES = [
    pytest.param(build, id=f"{kind}-{name}")
    for kind, registry in (("weight", WEIGHT_QUANTIZERS), ("activation", ACTIVATION_QUANTIZERS))
    for name, build in registry.items()
    if name != "float"
]


@pytest.mark.parametrize("build", CASES)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_code_is_the_nearest_integer_of_the_position(build, bits):
    low, high = allowed_bits(build)
    quantizer, x = build(min(max(bits, low), high)), torch.randn(16, 200)
    quantizer(x)  # those that learn from their first data do so now
    position = level_position(quantizer, x)
    assert position.min() >= 0
    assert position.max() <= quantizer.num_levels - 1
    assert ((position - quantizer.codes(x)).abs() <= 0.5 + 1e-4).all()
    assert position.requires_grad == any(p.requires_grad for p in quantizer.parameters())


def test_soft_histogram_counts_everything_once_and_tends_to_the_hard_one():
    position = torch.rand(1000, dtype=torch.float64) * 3
    hard = hard_histogram(position.round(), 4).double()
    distance = []
    for ramp in (1.0, 0.1, 1e-6):
        soft = soft_histogram(position, 4, ramp)
        assert float(soft.sum()) == pytest.approx(1000)
        distance.append(float((soft - hard).abs().sum()))
    assert distance[0] > distance[1] > distance[2] == pytest.approx(0, abs=0.1)


def test_entropy_of_known_counts_and_its_gradient():
    assert float(entropy_bits(torch.tensor([1, 1, 1, 1]))) == pytest.approx(2)
    assert float(entropy_bits(torch.tensor([4, 0, 0, 0]))) == pytest.approx(0, abs=1e-9)
    position = (torch.rand(50, dtype=torch.float64) * 2.9 + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: entropy_bits(soft_histogram(p, 4)), (position,))
    empty = torch.full((5,), 0.2, requires_grad=True)  # two levels without anything
    entropy_bits(soft_histogram(empty, 4)).backward()
    assert torch.isfinite(empty.grad).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_rescaling_alone_keeps_95_percent_of_the_bits_of_gaussian_weights(bits):
    weight = torch.randn(64, 576) * 0.03
    quantizer = EntropyPreservingWeightQuantizer(bits)
    assert hard_entropy(quantizer, weight) > 0.95 * bits
    quantizer.rescale = False
    assert hard_entropy(quantizer, weight) < 0.8 * bits  # min-max scaling piles them up in the middle


@pytest.mark.parametrize("bits", [2, 3])
def test_descending_the_penalty_raises_the_hard_entropy(bits):
    weight = (torch.randn(16, 200) ** 3).requires_grad_()  # heavy tails: far from the most entropy
    quantizer = EntropyPreservingWeightQuantizer(bits)
    before = hard_entropy(quantizer, weight.detach())
    optimizer = torch.optim.Adam([weight], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (-entropy_bits(soft_histogram(level_position(quantizer, weight), 2**bits))).backward()
        optimizer.step()
    assert hard_entropy(quantizer, weight.detach()) > before + 0.1


def test_plain_scale_has_nothing_clipped_and_survives_a_checkpoint():
    first, second = EntropyPreservingWeightQuantizer(2), EntropyPreservingWeightQuantizer(2)
    first.rescale = False
    weight = torch.randn(4, 50)
    assert not torch.equal(first(weight), second(weight))
    assert first(weight).abs().amax(1).allclose(weight.abs().amax(1))
    integer = first(weight) / first.scale(weight)
    torch.testing.assert_close(integer, 2.0 * first.codes(weight) - 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(weight), second(weight))
    second.load_state_dict(EntropyPreservingWeightQuantizer(2).state_dict())
    assert second.rescale


class Gradients(Callback):
    """Weight gradients as an optimizer sees them, step by step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append([layer.weight.grad.clone() for layer in quantized_layers(pl_module)])


def run(tmp_path, callbacks, batch_size=8, steps=1, module=None, **options):
    gradients = Gradients()
    module = module or TinyModule()
    runner = trainer(tmp_path, [*callbacks, gradients], max_steps=steps, **options)
    runner.fit(module, loader(batch_size), loader())
    return gradients.seen, module


def penalty_gradient(weight=0.1):
    module = TinyModule()
    for layer in quantized_layers(module):
        q = layer.weight_quantizer
        (weight * (2 - entropy_bits(soft_histogram(level_position(q, layer.weight), 4)))).backward()
    return [layer.weight.grad for layer in quantized_layers(module)]


class CPUScaler(MixedPrecision):
    """`16-mixed` needs a GPU in Lightning; loss scaling itself does not."""

    def __init__(self):
        super().__init__("bf16-mixed", "cpu")
        self.scaler = GradScaler("cpu", init_scale=1024.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 4},
        {"precision": "bf16-mixed"},
        {"plugins": [CPUScaler()]},
        {"plugins": [CPUScaler()], "accumulate_grad_batches": 2},
    ],
    ids=["plain", "accumulated", "bf16", "scaled", "scaled-accumulated"],
)
def test_the_penalty_is_counted_once_and_scaled_like_the_loss(tmp_path, options):
    with_penalty, _ = run(tmp_path, [EntropyRegularizer(0.1)], **options)
    without, _ = run(tmp_path, [], **options)
    for got, base, expected in zip(with_penalty[0], without[0], penalty_gradient(), strict=True):
        torch.testing.assert_close(got - base, expected, rtol=1e-3, atol=1e-6)


def test_the_activation_penalty_reaches_thresholds_and_earlier_layers(tmp_path):
    class Thresholds(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.start = pl_module.net[2].activation_quantizer.start.grad.clone()
            self.weight = pl_module.net[0].weight.grad.clone()

    plain, penalized = Thresholds(), Thresholds()
    run(tmp_path, [plain])
    run(tmp_path, [penalized, EntropyRegularizer(activation_weight=0.5)])
    assert not torch.allclose(plain.start, penalized.start)
    assert not torch.allclose(plain.weight, penalized.weight)


def test_only_the_chosen_layers_are_penalized(tmp_path):
    got, _ = run(tmp_path, [EntropyRegularizer(0.1, layers=("2",))])
    base, _ = run(tmp_path, [])
    assert torch.equal(got[0][0], base[0][0])
    assert not torch.equal(got[0][1], base[0][1])


def test_the_schedule_turns_the_penalty_on(tmp_path):
    callback = EntropyRegularizer(0.1, schedule="linear", start=4, end=8, unit="steps")
    got, _ = run(tmp_path, [callback], steps=8)
    base, _ = run(tmp_path, [], steps=8)
    same = [all(torch.equal(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(got, base, strict=True)]
    assert same == [True] * 5 + [False] * 3
    callback._steps_per_unit = 1.0
    assert [callback.factor(step) for step in (0, 4, 6, 8, 9)] == [0, 0, 0.5, 1, 1]


def test_the_loss_is_left_as_it_was_found(tmp_path):
    _, module = run(tmp_path, [EntropyRegularizer(0.1), EntropyRegularizer(0.1, layers=("2",))])
    assert "training_step" not in module.__dict__
    assert not any(m._forward_pre_hooks for m in module.modules())
    failing = TinyModule()
    failing.configure_optimizers = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, [EntropyRegularizer(0.1)], module=failing)
    assert "training_step" not in failing.__dict__


def test_terms_are_added_to_dictionaries_and_not_to_skipped_batches():
    module = TinyModule()
    module.training_step = lambda kind: {"loss": torch.ones(()), "n": 1} if kind else None
    handle = attach_loss_term(module, lambda: torch.full((), 2.0, dtype=torch.float64))
    assert module.training_step(1) == {"loss": torch.tensor(3.0), "n": 1}
    assert module.training_step(0) is None
    handle.remove()


def test_rescaling_is_switched_by_layer_and_kept_by_a_loaded_state(tmp_path):
    _, module = run(tmp_path, [EntropyRegularizer(no_rescale=("0",))])
    assert [layer.weight_quantizer.rescale for layer in quantized_layers(module)] == [False, True]
    fresh = TinyModule()
    fresh.load_state_dict(module.state_dict())
    assert not fresh.net[0].weight_quantizer.rescale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": -1.0}, "weight: got -1.0, allowed is 0 or more"),
        ({"weight": math.nan}, "weight: got nan"),
        ({"schedule": "steps"}, "schedule: got 'steps'"),
        ({"start": 0.9, "end": 0.1}, "start: got 0.9"),
        ({"softness": 0.0}, "softness: got 0.0"),
        ({"max_samples": 0}, "max_samples: got 0"),
    ],
)
def test_bad_arguments_give_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message):
        EntropyRegularizer(**arguments)


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (EntropyRegularizer(0.1, layers=("x*",)), TinyModule(), "layers: 'x\\*' matches no quantized layer"),
        (
            EntropyRegularizer(no_rescale=("0",)),
            TinyModule(spec=QuantSpec(2, 2, "lsq", "lsq")),
            "no_rescale: 0",
        ),
    ],
)
def test_bad_combinations_give_one_clear_line(tmp_path, callback, module, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, [callback], module=module)


def test_manual_optimization_is_refused(tmp_path):
    module = TinyModule()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="needs automatic_optimization"):
        attach_loss_term(module, lambda: None)
