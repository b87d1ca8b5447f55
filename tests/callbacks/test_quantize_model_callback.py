"""`QuantizeModel`: any LightningModule is quantized, trained, saved, loaded and resumed by a policy."""

import pytest
import torch
from any_modules import LastClassifier, LateClassifier, PlainClassifier, loader, trainer
from torch import nn

import lightning_n2uq
from lightning_n2uq.callbacks import QuantizeModel
from lightning_n2uq.convert import CalibratedInput
from lightning_n2uq.convert.record import KEY
from lightning_n2uq.layers import QuantConv2d, QuantLinear

W2A2 = {"weight_bits": 2, "activation_bits": 2}
INNER = ["net.3", "net.6", "net.10"]


def quantized(module):
    return [name for name, m in module.named_modules() if isinstance(m, QuantConv2d | QuantLinear)]


def ranges(module):
    return [m for m in module.modules() if isinstance(m, CalibratedInput)]


def fit(tmp_path, module, callbacks, ckpt_path=None, **options):
    run = trainer(tmp_path, callbacks, **options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


@pytest.mark.parametrize("kind", [PlainClassifier, LateClassifier])
def test_a_module_is_quantized_trained_and_evaluated(tmp_path, kind):
    module = kind()
    run = fit(tmp_path, module, [QuantizeModel(W2A2)], limit_val_batches=1.0, max_epochs=8)
    assert quantized(module) == INNER
    assert all(m.fitted for m in ranges(module))
    assert float(run.callback_metrics["train_loss"]) < 1.1
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    assert len(run.predict(module, loader())) == 4
    assert quantized(module) == INNER
    assert "configure_model" not in vars(module)


@pytest.mark.parametrize("kind", [PlainClassifier, LateClassifier])
def test_a_checkpoint_loads_into_fresh_modules(tmp_path, kind):
    module = kind()
    run = fit(tmp_path, module, [QuantizeModel({**W2A2, "rules": [{"name": "*.10", "weight_bits": 3}]})])
    x = next(iter(loader()))[0]
    wanted = module.eval()(x)
    for weights_only in (False, True):
        run.save_checkpoint(path := tmp_path / "x.ckpt", weights_only=weights_only)
        loaded = kind.load_from_checkpoint(path)
        assert type(loaded) is kind
        assert quantized(loaded) == INNER
        assert torch.equal(loaded.eval()(x), wanted)
        fresh, other = kind(), trainer(tmp_path, [QuantizeModel()])
        scores = other.predict(fresh, loader(), ckpt_path=path)
        assert torch.equal(scores[0], wanted)
        assert fresh.net[10].weight_quantizer.bits == 3
    again = trainer(tmp_path, [QuantizeModel()])
    assert torch.equal(again.predict(loaded, loader())[0], wanted)
    again.save_checkpoint(second := tmp_path / "y.ckpt")
    assert torch.load(second, weights_only=True)[KEY] == torch.load(path, weights_only=True)[KEY]


@pytest.mark.parametrize("policy", [W2A2, None])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, policy):
    whole = PlainClassifier()
    fit(tmp_path, whole, [QuantizeModel(W2A2)], max_epochs=4)
    half = PlainClassifier()
    run = fit(tmp_path, half, [QuantizeModel(W2A2)], max_epochs=2)
    run.save_checkpoint(path := tmp_path / "half.ckpt")
    resumed = PlainClassifier()
    fit(tmp_path, resumed, [QuantizeModel(policy)], path, max_epochs=4)
    for (name, wanted), value in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, value), name


def test_ranges_are_fitted_to_the_float_networks_maps_before_the_first_step(tmp_path):
    seen = {}

    class Noting(PlainClassifier):
        def training_step(self, batch, batch_idx):
            x = batch[0]
            if batch_idx == 0:
                before = torch.get_rng_state()
                super().training_step(batch, batch_idx)
                seen["random"] = torch.equal(before, torch.get_rng_state())
                seen["offsets"] = [m.offset.item() for m in ranges(self)]
                seen["steps"] = int(self.net[1].num_batches_tracked)
            return super().training_step((x, batch[1]), batch_idx)

    fit(tmp_path, module := Noting(), [QuantizeModel(W2A2)], max_steps=1)
    assert seen["random"]
    assert seen["steps"] == 1
    assert len(set(seen["offsets"])) == 3
    assert all(offset < -0.05 for offset in seen["offsets"][:2])
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_quantizer_parameters_have_groups_of_their_own(tmp_path):
    class Scheduled(PlainClassifier):
        def configure_optimizers(self):
            weights = [p for p in self.parameters() if p.ndim > 1]
            others = [p for p in self.parameters() if p.ndim < 2]
            groups = [{"params": weights, "name": "w"}, {"params": others, "name": "o", "lr": 0.02}]
            optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)]

    run = fit(tmp_path, module := Scheduled(), [QuantizeModel(W2A2)], max_epochs=2)
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert list(groups) == ["w", "o", "o/quantizer"]
    own = {id(p) for q in ranges(module) for p in q.parameters()}
    assert {id(p) for p in groups["o/quantizer"]["params"]} == own
    assert groups["o/quantizer"]["weight_decay"] == 0
    assert groups["o/quantizer"]["lr"] == pytest.approx(0.02 * 0.1 * 0.25)
    run = fit(tmp_path, Scheduled(), [QuantizeModel(W2A2, quantizer_lr_multiplier=None)], max_steps=1)
    assert len(run.optimizers[0].param_groups) == 2


def test_where_no_group_can_be_added_a_warning_says_so(tmp_path):
    class Counted(PlainClassifier):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0])]

    class Forgetful(PlainClassifier):
        def configure_optimizers(self):
            return torch.optim.SGD([m.weight for m in self.net if hasattr(m, "weight")], lr=0.01)

    with pytest.warns(UserWarning, match="allows no group more"):
        fit(tmp_path, Counted(), [QuantizeModel(W2A2)], max_steps=1)
    with pytest.warns(UserWarning, match="15 of 15 quantizer parameters are in no optimizer"):
        fit(tmp_path, Forgetful(), [QuantizeModel(W2A2)], max_steps=1)


def test_first_and_last_layers_by_execution(tmp_path):
    by_shape = QuantizeModel(W2A2, input_shape=[2, 3, 8, 8])
    fit(tmp_path, module := LastClassifier(), [by_shape], max_steps=1)
    assert quantized(module) == ["body"]
    report = lightning_n2uq.quantize(module := LastClassifier(), W2A2)
    assert report.quantized == ["stem", "box"]
    assert "first layer by registration" in str(report)
    module = LastClassifier()
    module.example_input_array = torch.zeros(1, 3, 8, 8)
    assert "last layer by execution" in str(lightning_n2uq.quantize(module, W2A2))
    assert quantized(module) == ["body"]


def test_parts_and_exclusions(tmp_path):
    class Pair(PlainClassifier):
        def __init__(self):
            super().__init__()
            self.teacher = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
            self.critic = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])

    with pytest.warns(UserWarning, match=r"critic.1, critic.2: no batch ran through"):
        fit(tmp_path, Pair(), [QuantizeModel({**W2A2, "modules": ["net", "critic"]})], max_steps=1)
    policy = {**W2A2, "modules": ["net", "critic"], "exclude": ["net.6", "critic.1"]}
    fit(tmp_path, module := Pair(), [QuantizeModel(policy, 0)], max_steps=1)
    assert quantized(module) == ["net.3", "net.10", "critic.2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": {"weight_bit": 2}}, "policy: got weight_bit"),
        ({"policy": "nowhere.yaml"}, "policy: no such file 'nowhere.yaml'"),
        ({"calibration_batches": -1}, "calibration_batches: got -1"),
        ({"quantizer_lr_multiplier": -0.5}, "quantizer_lr_multiplier: got -0.5"),
        ({"input_shape": [0]}, "input_shape: got 0"),
        ({"policy": {"exclude": "net"}}, "exclude: got 'net', allowed is a list of names"),
    ],
)
def test_impossible_values_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizeModel(**arguments)


def test_what_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="modules: got 'nett', allowed are net and their parts"):
        fit(tmp_path, PlainClassifier(), [QuantizeModel({"modules": ["nett"]})])
    with pytest.raises(ValueError, match="quantizes nothing in PlainClassifier"):
        fit(tmp_path, PlainClassifier(), [QuantizeModel({"exclude": ["net"]})])
    run = fit(tmp_path, module := PlainClassifier(), [QuantizeModel(W2A2)], max_steps=1)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"policy.weight_bits: got 3, allowed is 2"):
        fit(tmp_path, module, [QuantizeModel({**W2A2, "weight_bits": 3})])
    with pytest.raises(ValueError, match=r"ckpt_path: got a checkpoint with net.10 n2uq 2"):
        fit(tmp_path, PlainClassifier(), [QuantizeModel({**W2A2, "weight_bits": 3})], path)


def test_a_policy_may_be_a_file(tmp_path):
    (tmp_path / "policy.yaml").write_text("weight_bits: 3\nrules:\n  - {type: linear, quantize: false}\n")
    fit(tmp_path, module := PlainClassifier(), [QuantizeModel(str(tmp_path / "policy.yaml"))], max_steps=1)
    assert quantized(module) == ["net.3", "net.6"]
    assert module.net[3].weight_quantizer.bits == 3
