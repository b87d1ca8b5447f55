"""Attention's products in a run: monitored, annealed, saved, loaded and resumed like quantized layers."""

import pytest
import torch
from any_modules import PlainClassifier, loader, trainer
from torch import nn
from torch.nn import functional as F

from lightning_n2uq.callbacks import (
    EntropyRegularizer,
    QuantizationMonitor,
    QuantizeModel,
    ThresholdAnnealing,
)
from lightning_n2uq.convert.attention_products import AttentionProducts
from lightning_n2uq.convert.head_input import HeadInput
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

POLICY = {"weight_bits": 2, "activation_bits": 2, "attention_bits": 2}
OPERANDS = ["query", "key", "probabilities", "value"]


class OwnAttention(nn.Module):
    """Attention of a user's own, by torch's function."""

    def __init__(self, width=8, num_heads=2):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Attentive(PlainClassifier):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.head = nn.Linear(24, 8), nn.Linear(8, 4)
        self.net = OwnAttention()
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        return self.head(self.net(self.stem(x.transpose(1, 2).flatten(2))).mean(1))


def fit(tmp_path, module, callbacks, ckpt_path=None, **options):
    run = trainer(tmp_path, callbacks, **options)
    run.fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return run


def test_monitor_regularizer_and_annealing_see_every_operand(tmp_path):
    monitor = QuantizationMonitor(every_n_steps=2, dirpath=str(tmp_path))
    entropy = EntropyRegularizer(weight=0.0, activation_weight=0.1)
    ramps = []

    class Noting(Attentive):
        def on_before_optimizer_step(self, optimizer):
            ramps.append([operand.method.ramp for operand in self.net.products.children()])

    annealing = ThresholdAnnealing(0.0, 0.9)
    fit(tmp_path, module := Noting(), [QuantizeModel(POLICY), annealing, monitor, entropy], max_epochs=1)
    names = [record.name for record in monitor.records]
    assert [name for name in names if "products" in name] == [f"products.{x}.levels" for x in OPERANDS]
    for record in monitor.records:
        assert sum(usage > 0 for usage in record.activation.usage) >= 2, record.name
        assert (record.weight is None) == ("products" in record.name)
    assert ramps[0] == [1.0] * 4
    assert all(isinstance(x.method, LearnableThresholdQuantizer) for x in module.net.products.children())


def test_a_checkpoint_loads_and_a_run_resumes_with_the_same_products(tmp_path):
    fit(tmp_path, whole := Attentive(), [QuantizeModel(POLICY)], max_epochs=2)
    run = fit(tmp_path, half := Attentive(), [QuantizeModel(POLICY)], max_epochs=1)
    run.save_checkpoint(path := tmp_path / "half.ckpt")
    assert all(m.fitted for m in half.modules() if isinstance(m, HeadInput))
    x = next(iter(loader()))[0]
    loaded = Attentive.load_from_checkpoint(path)
    assert isinstance(loaded.net.products, AttentionProducts)
    assert torch.equal(loaded.eval()(x), half.eval()(x))
    fit(tmp_path, resumed := Attentive(), [QuantizeModel()], path, max_epochs=2)
    for (name, wanted), value in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(wanted, value), name
    other = {**POLICY, "attention_quantizer": "n2uq_fixed"}
    message = r"net\.products n2uq 2, allowed is n2uq_fixed 2, as the policy says"
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Attentive(), [QuantizeModel(other)], path, max_epochs=2)


def test_operands_are_in_the_optimizer_s_group_of_quantizers(tmp_path):
    fit(tmp_path, module := Attentive(), [QuantizeModel(POLICY)], max_epochs=1)
    groups = module.optimizers().optimizer.param_groups
    assert len(groups) == 2
    slow = {id(p) for p in groups[1]["params"]}
    assert {id(p) for p in module.net.products.parameters()} <= slow
