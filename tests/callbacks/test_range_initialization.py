"""Ranges of learned thresholds come from the first batch of a run, once, and from nothing else."""

import pytest
import torch
from lightning.pytorch import Callback
from tiny_training import TinyModule, loader, trainer

from lightning_n2uq.callbacks import RangeInitialization
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.quantizers import LearnableThresholdQuantizer
from lightning_n2uq.quantizers.ranges import best_range


class Watch(Callback):
    """The quantizers' parameters before and after every batch, before the optimizer's step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(quantizers_of(pl_module))


def quantizers_of(module):
    return [
        [p.detach().clone() for p in (one.start, one.widths, one.scale_in, one.scale_out)]
        for one in module.modules()
        if isinstance(one, LearnableThresholdQuantizer)
    ]


def same(one, other):
    return all(torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", ["n2uq", "n2uq_fixed"])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_range_is_the_best_for_the_first_batch(tmp_path, bits, name):
    callback, watch = RangeInitialization(), Watch()
    module = TinyModule(spec=QuantSpec(bits, bits, "n2uq", name))
    first = next(iter(loader()))[0]
    fresh = TinyModule(spec=QuantSpec(bits, bits, "n2uq", name))
    trainer(tmp_path, [callback, watch], max_epochs=1).fit(module, loader(), loader())
    ends = []
    with torch.no_grad():
        x = first
        for layer in fresh.net:
            if hasattr(layer, "activation_quantizer"):
                ends.append(best_range(x.flatten().clamp_min(0), 2**bits)[1])
                layer.activation_quantizer.scale_in.fill_(2 / ends[-1])
                layer.activation_quantizer.scale_out.fill_(ends[-1] / 2)
            x = layer(x)
    for (start, widths, scale_in, scale_out), end in zip(watch.seen[0], ends, strict=True):
        assert float(scale_in) == pytest.approx(2 / float(end), rel=1e-6)
        assert float(scale_out) == pytest.approx(float(end) / 2, rel=1e-6)
        assert float(start) == 0.0
        assert len(set(widths.tolist())) == 1
    assert list(callback.ranges.values()) == pytest.approx([float(end) for end in ends])
    assert not same(watch.seen[0], watch.seen[1])  # scales learn
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_only_the_chosen_layers_are_fitted(tmp_path):
    callback, module = RangeInitialization(("2",)), TinyModule()
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader())
    assert list(callback.ranges) == ["2"]
    assert callback.state_key != RangeInitialization().state_key


def test_a_resumed_run_fits_nothing_again(tmp_path):
    whole, watch = TinyModule(), Watch()
    trainer(tmp_path, [RangeInitialization(), watch], max_epochs=2).fit(whole, loader(), loader())
    half = TinyModule()
    first = trainer(tmp_path, [RangeInitialization()], max_epochs=1)
    first.fit(half, loader(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    rest, again, callback = TinyModule(), Watch(), RangeInitialization()
    trainer(tmp_path, [callback, again], max_epochs=2).fit(
        rest, loader(), loader(), ckpt_path=tmp_path / "half.ckpt"
    )
    assert same(again.seen[0], watch.seen[len(watch.seen) // 2])
    assert same(quantizers_of(rest), quantizers_of(whole))
    assert len(callback.ranges) == 2


def test_a_second_module_is_fitted_too(tmp_path):
    callback, modules = RangeInitialization(), [TinyModule(), TinyModule()]
    for module in modules:
        trainer(tmp_path, [callback], max_epochs=1).fit(module, loader(), loader())
    assert same(*map(quantizers_of, modules))


def test_loaded_thresholds_stay(tmp_path):
    module, watch = TinyModule(), Watch()
    with torch.no_grad():
        module.net[0].activation_quantizer.widths.mul_(1.5)
    before = quantizers_of(module)
    callback = RangeInitialization()
    with pytest.warns(
        UserWarning, match="RangeInitialization: 1 of 2 layers keep thresholds that were loaded"
    ):
        trainer(tmp_path, [callback, watch], max_epochs=1).fit(module, loader(), loader())
    assert same(watch.seen[0][:1], before[:1])
    assert list(callback.ranges) == ["2"]


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_inputs_without_a_range_leave_the_first_values(tmp_path, value):
    module, watch = TinyModule(), Watch()
    callback = RangeInitialization(("0",))
    module.on_before_batch_transfer = lambda batch, index: (torch.full_like(batch[0], value), batch[1])
    before = quantizers_of(module)
    with pytest.warns(UserWarning, match="no finite input above 0 in the first batch, not fitted: 0"):
        trainer(tmp_path, [callback, watch], max_steps=1).fit(module, loader(), loader())
    assert same(watch.seen[0], before)
    assert callback.ranges == {}


def test_another_method_in_a_config_that_has_it_is_a_warning(tmp_path):
    module = TinyModule(spec=QuantSpec(2, 2, "n2uq", "lsq"))
    with pytest.warns(UserWarning, match="RangeInitialization: no layer has an activation quantizer 'n2uq'"):
        trainer(tmp_path, [RangeInitialization()], max_epochs=1).fit(module, loader(), loader())


def test_named_layers_of_other_methods_are_refused(tmp_path):
    module = TinyModule(spec=QuantSpec(2, 2, "n2uq", "lsq"))
    with pytest.raises(
        ValueError, match="layers: none of the chosen layers has an activation quantizer 'n2uq'"
    ):
        trainer(tmp_path, [RangeInitialization(("0",))]).fit(module, loader(), loader())
