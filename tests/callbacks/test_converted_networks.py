"""Every callback that looks at quantizers does so in converted networks, attention included."""

import pytest
import torch
from any_modules import PlainClassifier, loader, trainer
from torch import nn

from lightning_n2uq.callbacks import (
    EntropyRegularizer,
    QuantizationMonitor,
    QuantizeModel,
    ThresholdAnnealing,
    TorchCompile,
)
from lightning_n2uq.convert import CalibratedInput, QuantMultiheadAttention
from lightning_n2uq.quantizers.positions import level_position

W2A2 = {"weight_bits": 2, "activation_bits": 2}
METHODS = [("n2uq", "n2uq"), ("lsq", "lsq"), ("dorefa", "dorefa"), ("apot", "apot"), ("lsq_plus", "lsq_plus")]


class Attentive(PlainClassifier):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(24, 8), nn.Linear(8, 4)
        self.net = nn.MultiheadAttention(8, 2, batch_first=True)
        self.example_input_array = torch.zeros(1, 3, 8, 8)

    def forward(self, x):
        x = self.stem(x.transpose(1, 2).flatten(2))
        return self.head(self.net(query=x, key=x, value=x, need_weights=False)[0].mean(1))


def fit(tmp_path, module, callbacks, **options):
    run = trainer(tmp_path, callbacks, **options)
    run.fit(module, loader(), loader())
    return run


@pytest.mark.parametrize("kind", [PlainClassifier, Attentive])
@pytest.mark.parametrize("methods", METHODS)
def test_monitor_and_entropy_regularizer_follow_converted_layers(tmp_path, kind, methods):
    monitor = QuantizationMonitor(every_n_steps=2, dirpath=str(tmp_path))
    entropy = EntropyRegularizer(weight=0.1, activation_weight=0.1)
    policy = {**W2A2, "weight_quantizer": methods[0], "activation_quantizer": methods[1]}
    fit(tmp_path, module := kind(), [QuantizeModel(policy), monitor, entropy], max_epochs=1)
    expected = 3 if kind is PlainClassifier else 2
    assert len(monitor.records) == expected
    assert isinstance(module.net, QuantMultiheadAttention) == (kind is Attentive)
    for record in monitor.records:
        assert sum(record.activation.usage) > 0
        assert record.weight is not None
        assert sum(usage > 0 for usage in record.activation.usage) >= 2


@pytest.mark.parametrize("method", [activation for _, activation in METHODS])
@pytest.mark.parametrize("fitted", [True, False])
def test_positions_and_codes_of_a_converted_input_are_those_of_its_forward_pass(method, fitted):
    from lightning_n2uq.quantizers import activation_quantizer

    torch.manual_seed(0)
    quantizer, x = CalibratedInput(activation_quantizer(method, 3)), torch.randn(400) - 0.3
    if fitted:
        quantizer(x)
    quantizer.eval()
    y, codes = quantizer(x).detach(), quantizer.codes(x)
    for code in codes.unique():
        assert y[codes == code].unique().numel() == 1
    assert y.unique().numel() == codes.unique().numel()
    assert torch.equal(codes, level_position(quantizer, x).round().to(torch.uint8))


def test_annealing_ramps_freezes_and_narrows_converted_layers(tmp_path):
    annealing = ThresholdAnnealing(0.0, 0.5, freeze_after=0.75, bits=(4, 2), bits_at=(0.0, 0.5))
    seen = []

    class Noting(PlainClassifier):
        def on_before_optimizer_step(self, optimizer):
            quantizer = self.net[3].activation_quantizer
            seen.append((quantizer.inner.ramp, quantizer.bits, quantizer.inner.start.grad is None))
            assert (quantizer.offset.grad is None) == seen[-1][2]

    fit(tmp_path, module := Noting(), [QuantizeModel(W2A2), annealing], max_epochs=2)
    assert [bits for _, bits, _ in seen] == [4] * 4 + [2] * 4
    assert seen[0][0] == 1.0
    assert seen[-1] == (0.0, 2, True)
    assert module.net[3].activation_quantizer.num_levels == 4
    run = trainer(tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert PlainClassifier.load_from_checkpoint(path).net[3].activation_quantizer.inner.widths.numel() == 3


@pytest.mark.integration
def test_a_converted_network_compiles_once(tmp_path):
    compiled = []

    class Counting(TorchCompile):
        def setup(self, trainer, pl_module, stage):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            super().setup(trainer, pl_module, stage)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    compiling = Counting(modules=["net"], backend="aot_eager")
    fit(
        tmp_path,
        PlainClassifier(),
        [QuantizeModel({**W2A2, "weight_quantizer": "lsq"}), compiling],
        limit_val_batches=1,
        max_epochs=3,
    )
    assert compiled[0] == 0
    assert compiled[1:] == [1] * 11
    assert compiling.calls == {"compiled": 11, "uncompiled": 2}  # the float network, the first step
