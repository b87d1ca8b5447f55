"""`QuantizeModel` beside what users train with: averages, teachers, compilation, fine-tuning."""

import copy

import pytest
import torch
from any_modules import PlainClassifier, loader, trainer
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils.checkpoint import checkpoint

from lightning_n2uq.callbacks import QuantizeModel
from lightning_n2uq.convert import CalibratedInput, quantize_model
from lightning_n2uq.quantizers import quantizer_parameters

callbacks = pytest.importorskip("lightning.pytorch.callbacks")
W2A2 = {"weight_bits": 2, "activation_bits": 2}
LSQ = {**W2A2, "weight_quantizer": "lsq", "activation_quantizer": "lsq"}
NAMES = [name for name in ("EMAWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)]


def ranges(module):
    return [m for m in module.modules() if isinstance(m, CalibratedInput)]


def fit(tmp_path, module, extra, ckpt_path=None, **options):
    run = trainer(tmp_path, extra, **options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


def equal(first, second):
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("policy", [W2A2, LSQ], ids=["n2uq", "lsq"])
@pytest.mark.parametrize("average", [get_ema_avg_fn(0.9), None], ids=["ema", "mean"])
def test_a_copy_from_before_the_first_batch_evaluates_as_its_state_dict_loaded_anew(policy, average):
    model = PlainClassifier().net
    quantize_model(model, policy)
    mean = AveragedModel(model, avg_fn=average, use_buffers=True)
    teacher = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in loader():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        mean.update_parameters(model)
    teacher.load_state_dict(model.state_dict())
    x = next(iter(loader()))[0]
    for source in (mean.module, teacher):
        fresh = PlainClassifier().net
        quantize_model(fresh, policy)
        fresh.load_state_dict(source.state_dict())
        assert all(m.fitted for m in ranges(source))
        assert torch.equal(source.eval()(x), fresh.eval()(x))


@pytest.mark.integration
@pytest.mark.parametrize("name", NAMES)
def test_averages_of_weights_resume_exactly(tmp_path, name):
    def both():
        options = {"decay": 0.9} if name.startswith("EMA") else {}
        return [QuantizeModel(W2A2), getattr(callbacks, name)(**options)]

    whole, half, resumed = PlainClassifier(), PlainClassifier(), PlainClassifier()
    fit(tmp_path, whole, both(), limit_val_batches=2, max_epochs=4)

    class Saving(callbacks.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(tmp_path, half, [*both(), Saving()], limit_val_batches=2, max_epochs=4)
    fit(tmp_path, resumed, both(), tmp_path / "half.ckpt", limit_val_batches=2, max_epochs=4)
    equal(whole, resumed)
    x = next(iter(loader()))[0]
    run = trainer(tmp_path)
    run.strategy.connect(resumed)
    run.save_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(
        PlainClassifier.load_from_checkpoint(tmp_path / "end.ckpt").eval()(x), resumed.eval()(x)
    )


def test_stochastic_weight_averaging_runs(tmp_path):
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(tmp_path, module := PlainClassifier(), [QuantizeModel(W2A2), swa], max_epochs=3)
    assert all(m.fitted for m in ranges(module))
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("name", [*NAMES, "StochasticWeightAveraging"])
def test_callbacks_that_copy_come_behind(tmp_path, name):
    options = {"swa_lrs": 0.01} if name.startswith("Stoch") else {}
    behind = getattr(callbacks, name)(**options)
    with pytest.raises(ValueError, match=f"callbacks: got QuantizeModel behind {name}, allowed is before it"):
        fit(tmp_path, PlainClassifier(), [behind, QuantizeModel(W2A2)])


def test_a_teacher_copied_in_the_module_stays_beside_its_student(tmp_path):
    class Teaching(PlainClassifier):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                wanted = self.teacher(batch[0])
            return nn.functional.mse_loss(self.net(batch[0]), wanted)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.data.lerp_(new.data, 0.1)

    run = fit(tmp_path, module := Teaching(), [QuantizeModel(W2A2)], max_epochs=1)
    assert len(ranges(module.teacher)) == len(ranges(module.net)) == 3
    assert all(m.fitted for m in ranges(module))
    assert not any(p.requires_grad for p in module.teacher.parameters())
    held = {p for group in run.optimizers[0].param_groups for p in group["params"] if p.grad is not None}
    assert held.isdisjoint(module.teacher.parameters())


def test_two_networks_under_manual_optimization(tmp_path):
    class Adversarial(PlainClassifier):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.maker = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 4))
            self.critic = nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 8), nn.ELU(), nn.Linear(8, 1))
            del self.net

        def training_step(self, batch, batch_idx):
            make, judge = self.optimizers()
            real = batch[0].mean((2, 3)).repeat(1, 2)[:, :4]
            made = self.maker(torch.randn_like(real))
            for optimizer, loss in (
                (judge, lambda: self.critic(made.detach()).mean() - self.critic(real).mean()),
                (make, lambda: -self.critic(made).mean()),
            ):
                optimizer.zero_grad()
                self.manual_backward(loss())
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.maker, self.critic)]

    run = fit(tmp_path, module := Adversarial(), [QuantizeModel({**W2A2, "modules": ["maker", "critic"]})])
    assert [len(optimizer.param_groups) for optimizer in run.optimizers] == [2, 2]
    assert len(ranges(module)) == 2
    assert all(m.fitted and m.offset.item() < 0 for m in ranges(module))


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    class Sparing(PlainClassifier):
        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    for kind in (plain := PlainClassifier(), sparing := Sparing()):
        kind.net[1] = kind.net[4] = nn.Identity()  # batch norms would see each batch twice
        fit(tmp_path, kind, [QuantizeModel(W2A2)], max_epochs=1)
    equal(plain, sparing)


def test_frozen_layers_have_frozen_quantizers_until_they_are_thawed(tmp_path):
    class Frozen(PlainClassifier):
        def __init__(self):
            super().__init__()
            self.net[:8].requires_grad_(False)

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    fit(tmp_path, module := Frozen(), [QuantizeModel(W2A2)], max_epochs=1)
    assert {name.split(".")[1] for name, _ in quantizer_parameters(module)} == {"10"}

    class Tuned(PlainClassifier):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = self.net[:9], self.net[9:]
            del self.net

        def forward(self, x):
            return self.head(self.backbone(x))

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01)

    thawing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.001, train_bn=False)
    for extra in ([QuantizeModel(W2A2), thawing], [thawing, QuantizeModel(W2A2)]):
        module = Tuned()
        before = module.backbone[3].weight.clone()
        run = fit(tmp_path, module, extra, max_epochs=3)
        held = {p for group in run.optimizers[0].param_groups for p in group["params"]}
        assert all(p in held for _, p in quantizer_parameters(module))
        assert not torch.equal(before, module.backbone[3].weight)


@pytest.mark.integration
def test_a_compiled_module_is_compiled_after_its_ranges_are_known(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = PlainClassifier()
    module.net = torch.compile(module.net, backend="aot_eager", dynamic=False)
    fit(tmp_path, module, [QuantizeModel({**LSQ, "modules": ["net"]})], max_epochs=2)
    assert all(m.fitted for m in ranges(module))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
