from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_training import TinyModule, loader, trainer
from torch import nn

from lightning_n2uq.backbones import build
from lightning_n2uq.callbacks import ThresholdAnnealing
from lightning_n2uq.callbacks._annealing.freezing import BatchNormAverages
from lightning_n2uq.callbacks._common.quantized_layers import quantized_layers
from lightning_n2uq.callbacks._common.timeline import CURVES, decay
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.ops import reference, threshold_quantize
from lightning_n2uq.ops.staircase import ramp_quantize
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

# Resuming without the callback that saved the checkpoint is what these tests do.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


class Watch(Callback):
    """Ramp and bits that each training batch ran with, and what validation ran with."""

    def __init__(self):
        self.ramps, self.bits, self.steps = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        quantizers = [layer.activation_quantizer for layer in quantized_layers(pl_module)]
        self.ramps.append([q.ramp for q in quantizers])
        self.bits.append([q.bits for q in quantizers])
        self.steps.append(trainer.global_step)


def fit(tmp_path, callback, module=None, ckpt_path=None, **options):
    watch = Watch()
    module = module or TinyModule()
    runner = trainer(tmp_path, [callback, watch], **options)
    runner.fit(module, loader(), val_dataloaders=loader(), ckpt_path=ckpt_path)
    return watch, module, runner


@pytest.mark.parametrize("curve", CURVES)
def test_curves_fall_from_exactly_one_to_exactly_zero(curve):
    values = [decay(curve, step, 10, 20) for step in range(31)]
    assert values[:11] == [1.0] * 11
    assert values[20:] == [0.0] * 11
    assert all(a > b for a, b in pairwise(values[10:21]))


@pytest.mark.parametrize(
    ("unit", "start", "end"), [("fraction", 0.25, 0.75), ("epochs", 0.5, 1.5), ("steps", 4, 12)]
)
def test_units_name_the_same_steps(tmp_path, unit, start, end):
    watch, module, _ = fit(tmp_path, ThresholdAnnealing(start, end, unit))
    assert [r[0] for r in watch.ramps] == [decay("linear", step, 4, 12) for step in range(16)]
    assert all(layer.activation_quantizer.ramp == 0 for layer in quantized_layers(module))  # after the fit


def test_input_to_output_order_never_anneals_a_layer_after_its_followers(tmp_path):
    callback = ThresholdAnnealing(0.0, 1.0, order="input_to_output")
    watch, *_ = fit(tmp_path, callback)
    assert all(first <= last for first, last in watch.ramps)
    assert any(first == 0 and last > 0.9 for first, last in watch.ramps)


def test_micro_batches_of_one_step_share_a_ramp(tmp_path):
    callback = ThresholdAnnealing(0, 8, "steps")
    watch, *_ = fit(tmp_path, callback, accumulate_grad_batches=2)
    ramps = [r[0] for r in watch.ramps]
    assert ramps[::2] == ramps[1::2] == [1 - step / 8 for step in range(8)]


def test_validation_uses_the_staircase_whatever_the_ramp(tmp_path):
    module = TinyModule()
    quantizer = module.net[0].activation_quantizer
    quantizer.ramp = 0.7
    x = torch.randn(64).abs()
    hard = threshold_quantize(x, quantizer.start, quantizer.widths, quantizer.scale_in, quantizer.scale_out)
    assert not torch.equal(quantizer(x), hard)
    assert torch.equal(quantizer.eval()(x), hard)


def learned_quantizer(bits=2):
    quantizer = LearnableThresholdQuantizer(bits)
    with torch.no_grad():
        quantizer.start.fill_(-0.1)
        quantizer.widths.mul_(torch.rand(quantizer.widths.shape) + 0.5)
        quantizer.scale_in.fill_(1.3)
    return quantizer


def test_ramp_one_is_the_surrogate_zero_the_staircase_and_between_them_it_is_monotone():
    quantizer = learned_quantizer()
    arguments = (quantizer.start, quantizer.widths, quantizer.scale_in)
    x = torch.linspace(-1, 3, 801, dtype=torch.float64)
    one = torch.ones(1)
    values = [threshold_quantize(x, *arguments, one, ramp) for ramp in (0.0, 0.25, 0.5, 0.75, 1.0)]
    torch.testing.assert_close(values[-1], reference.surrogate(x, *arguments), rtol=0, atol=1e-6)
    levels = torch.arange(4, dtype=torch.float64) * (2 / 3)
    assert torch.equal(values[0], levels[quantizer.codes(x).long()])
    for value in values:
        assert bool((value.diff() >= 0).all())
    distance = [(value - values[-1]).abs() for value in values]  # to the surrogate, point by point
    for nearer, farther in zip(distance[1:], distance, strict=False):
        assert bool((nearer <= farther + 1e-12).all())


def gradients(quantizer, x):
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    (quantizer(x) * torch.linspace(1, 2, x.numel())).sum().backward()
    return (
        x.grad,
        quantizer.start.grad.clone(),
        quantizer.widths.grad.clone(),
        quantizer.scale_in.grad.clone(),
    )


def test_gradients_do_not_depend_on_the_ramp_unless_asked():
    quantizer, x = learned_quantizer().train(), torch.randn(200)
    hard = gradients(quantizer, x)
    quantizer.ramp = 0.3
    assert all(torch.equal(a, b) for a, b in zip(hard, gradients(quantizer, x), strict=True))
    quantizer.ramp_gradient = True
    asked = gradients(quantizer, x)
    assert (asked[0] != 0).sum() < (hard[0] != 0).sum()  # only inputs on a ramp
    assert not torch.allclose(asked[2], hard[2])


def test_ramp_gradient_has_the_value_of_the_ramp_and_its_derivative():
    q = learned_quantizer().double()
    x = torch.randn(40, dtype=torch.float64)
    parameters = (q.start, q.widths, q.scale_in, q.scale_out)
    torch.testing.assert_close(ramp_quantize(x, *parameters, 0.4), threshold_quantize(x, *parameters, 0.4))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: ramp_quantize(*a, 0.4), (x, *parameters), eps=1e-7, atol=1e-5)


def test_frozen_thresholds_stay_while_everything_else_moves(tmp_path):
    snapshots = []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            q = pl_module.net[0].activation_quantizer
            state = (q.start, q.widths, q.scale_in, q.scale_out, pl_module.net[0].weight)
            snapshots.append([p.detach().clone() for p in state])

    callback = ThresholdAnnealing(0, 0.25, freeze_after=0.5)
    module = TinyModule(optimizer="adam")  # its moments would move a parameter whose gradient is zero
    trainer(tmp_path, [callback, Keep()]).fit(module, loader(), loader())
    frozen, last = snapshots[7], snapshots[-1]
    assert all(torch.equal(a, b) for a, b in zip(frozen[:3], last[:3], strict=True))
    assert not torch.equal(frozen[3], last[3])
    assert not torch.equal(frozen[4], last[4])
    assert not torch.equal(snapshots[0][1], frozen[1])


def test_batch_norm_statistics_become_averages_since_the_restart():
    norm, averages = nn.BatchNorm1d(3).train(), BatchNormAverages()
    norm(torch.randn(10, 3) + 100)
    averages.restart(norm)
    batches = [torch.randn(10, 3) for _ in range(4)]
    for batch in batches:
        norm(batch)
    torch.testing.assert_close(norm.running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    averages.release()
    assert norm.momentum == 0.1


def test_a_run_resumed_within_an_epoch_goes_on_averaging():
    straight, resumed = nn.BatchNorm1d(3).train(), nn.BatchNorm1d(3).train()
    first, second = torch.randn(10, 3), torch.randn(10, 3)
    BatchNormAverages().restart(straight)
    straight(first)
    resumed.load_state_dict(straight.state_dict())
    BatchNormAverages().resume(resumed)
    assert torch.equal(straight(second), resumed(second))
    assert torch.equal(straight.running_mean, resumed.running_mean)


def resumed_and_straight(tmp_path, make):
    keep = {"enable_checkpointing": True, "logger": False}
    saver = ModelCheckpoint(tmp_path / "c", filename="{epoch}", save_top_k=-1)
    callback, module = make()
    trainer(tmp_path, [callback, saver], max_epochs=4, **keep).fit(module, loader(), loader())
    straight = {name: p.clone() for name, p in module.state_dict().items()}
    callback, module = make()
    watch, module, _ = fit(
        tmp_path, callback, module, tmp_path / "c" / "epoch=1.ckpt", max_epochs=4, logger=False
    )
    return straight, module.state_dict(), watch


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_a_resumed_run_ends_exactly_where_the_straight_one_does(tmp_path, bits):
    def make():
        schedule = {} if bits is None else {"bits": bits, "bits_at": (0.0, 0.6)}
        return ThresholdAnnealing(0.0, 0.7, freeze_after=0.9, **schedule), TinyModule(optimizer="adam")

    straight, resumed, watch = resumed_and_straight(tmp_path, make)
    assert watch.ramps[0][0] == decay("linear", 16, 0, 0.7 * 32)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_longer_resumed_run_keeps_its_schedule_and_new_arguments_replace_it(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="c")
    options = {"max_epochs": 2, "enable_checkpointing": True}
    trainer(tmp_path, [ThresholdAnnealing(0.0, 1.0), saver], **options).fit(TinyModule(), loader(), loader())
    watch, *_ = fit(tmp_path, ThresholdAnnealing(0.0, 1.0), None, tmp_path / "c.ckpt", max_epochs=3)
    assert watch.ramps[0] == [0.0, 0.0]  # over, as it was
    with pytest.warns(UserWarning, match="arguments are not the checkpoint's"):
        watch, *_ = fit(tmp_path, ThresholdAnnealing(0.5, 1.0), None, tmp_path / "c.ckpt", max_epochs=3)
    assert watch.ramps[0][0] == pytest.approx(1 - 4 / 12)


def test_bits_go_down_and_optimizer_and_best_checkpoint_follow(tmp_path):
    callback = ThresholdAnnealing(0.0, 0.0, bits=(8, 4, 2), bits_at=(0, 0.25, 0.5))
    saver = ModelCheckpoint(tmp_path, filename="best", monitor="val/loss")
    module = TinyModule(optimizer="adam")
    options = {"max_epochs": 4, "enable_checkpointing": True, "limit_val_batches": 1.0}
    watch = Watch()
    runner = trainer(tmp_path, [callback, watch, saver], **options)
    runner.fit(module, loader(), loader())
    assert [b[0] for b in watch.bits] == [8] * 8 + [4] * 8 + [2] * 16
    quantizer = module.net[0].activation_quantizer
    assert quantizer.widths.shape == (3,)
    assert any(p is quantizer.widths for g in runner.optimizers[0].param_groups for p in g["params"])
    assert runner.optimizers[0].state[quantizer.widths]["exp_avg"].shape == (3,)
    TinyModule().load_state_dict(torch.load(saver.best_model_path, weights_only=True)["state_dict"])  # 2 bits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.6, "end": 0.4}, "start: got 0.6, allowed is at most end, which is 0.4"),
        ({"schedule": "quadratic"}, "schedule: got 'quadratic', allowed are linear, cosine, exponential"),
        ({"unit": "hours"}, "unit: got 'hours'"),
        ({"end": 2.0}, "end: got 2.0, allowed is 0 to 1"),
        ({"order": "backwards"}, "order: got 'backwards'"),
        ({"gradient": "none"}, "gradient: got 'none'"),
        ({"freeze_after": 0.1}, "freeze_after: got 0.1"),
        ({"bits": (8, 2)}, "bits: got"),
        ({"bits": (8, 2), "bits_at": (0.0, 0.0)}, "bits_at: got"),
        ({"bits": (9, 2), "bits_at": (0.0, 0.1)}, "bits: got 9"),
        ({"bits": (8, 2), "bits_at": (0.0, 0.9), "freeze_after": 0.8}, "before freeze_after"),
    ],
)
def test_bad_arguments_give_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        ThresholdAnnealing(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("callback", "module", "message"),
    [
        (
            ThresholdAnnealing(layers=("conv*",)),
            TinyModule(),
            "layers: 'conv\\*' matches no .* there are 0, 2",
        ),
        (ThresholdAnnealing(), TinyModule(spec=QuantSpec(2, 2, "lsq", "lsq")), "learned-threshold"),
        (
            ThresholdAnnealing(bits=(8, 4), bits_at=(0, 0.5)),
            TinyModule(),
            "the last is 4, .* own, which is 2",
        ),
    ],
)
def test_bad_combinations_give_one_clear_line(tmp_path, callback, module, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [callback]).fit(module, loader(), loader())


def test_layer_names_leave_out_what_all_share():
    names = [layer.name for layer in quantized_layers(build("resnet20", width=4))]
    assert names[0] == "layer1.0.conv1"
    assert "layer2.0.downsample.0" in names
