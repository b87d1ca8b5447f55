"""`sensitivity`: scores are what quantizing one layer does, and leave the network alone."""

import copy

import pytest
import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.convert import allocate_bits, quantize_model, sensitivity
from lightning_n2uq.convert.widths import Width
from lightning_n2uq.layers import QuantConv2d, QuantLinear

ALL = {"skip_first": False, "skip_last": False}


def batches(count=2, features=8):
    torch.manual_seed(3)
    return [(torch.randn(16, features), torch.randint(0, 4, (16,))) for _ in range(count)]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def loss(output, batch):
    return nn.functional.cross_entropy(output, batch[1])


def test_few_bits_hurt_more_than_many():
    found = sensitivity(mlp(), batches(), [2, 4, 8], ALL, loss)
    assert [layer.name for layer in found.layers] == ["0", "2", "4"]
    assert (
        [layer.macs for layer in found.layers] == [layer.weights for layer in found.layers] == [128, 256, 64]
    )
    for layer in found.layers:
        kl = list(layer.kl.values())
        assert kl[0] > 5 * kl[1] > 25 * kl[2] > 0
        assert abs(layer.loss[Width(8, 8)]) < 0.01
        assert layer.loss[Width(2, 2)] != 0
    assert found.measures == ("kl", "loss")
    assert found.batches == 2
    assert "kl 2" in str(found)


def test_a_layer_whose_quantization_is_harmless_scores_nothing():
    model = mlp()
    with torch.no_grad():
        model[2].weight.copy_(torch.randint(-1, 2, (16, 16)).float())  # on three levels
        model[0].weight.copy_(torch.eye(16, 8))
        model[0].bias.zero_()
        model[4].weight.mul_(4)
    data = [(torch.randint(0, 4, (32, 8)).float(), torch.randint(0, 4, (32,)))]  # inputs on four
    found = sensitivity(model, data, [2], ALL, loss)
    kl = {layer.name: layer.kl[Width(2, 2)] for layer in found.layers}
    assert kl["2"] == pytest.approx(0, abs=1e-6)
    assert kl["0"] == pytest.approx(0, abs=1e-6)
    assert kl["4"] > 0.01
    assert found.layers[1].loss[Width(2, 2)] == pytest.approx(0, abs=1e-5)


def test_a_score_is_that_of_the_layer_alone():
    model, data = mlp(), batches(1)
    methods = {"weight_quantizer": "float", "weight_bits": 32, "activation_quantizer": "lsq"}
    found = sensitivity(model, data, [2], {**ALL, **methods}).layers[1].kl[Width(2, 2)]
    alone = copy.deepcopy(model)
    rules = [{"name": "2"}, {"quantize": False}]
    quantize_model(alone, {**ALL, **methods, "activation_bits": 2, "rules": rules}, data)
    before, after = model(data[0][0]).log_softmax(1), alone.eval()(data[0][0]).log_softmax(1)
    assert found == pytest.approx((before.exp() * (before - after)).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["float", "quantized", "attention"])
def test_the_network_is_what_it_was(kind):
    if kind == "attention":
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, data = nn.Sequential(layer, nn.Linear(8, 4)), [torch.randn(2, 5, 8)]
    else:
        data = [torch.randn(4, 3, 8, 8)]
        quantizer = {"weight_quantizer": "float", "activation_quantizer": "float"} if kind == "float" else {}
        bits = (32, 32) if kind == "float" else (2, 2)
        model = backbones.resnet20(*bits, width=4, **quantizer)
    model.train()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    policy = {"exclude": ["layer2", "layer3"], "skip_first": kind != "attention"}
    found = sensitivity(model, data, [2, 3], policy)
    assert torch.equal(random, torch.get_rng_state())
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(value > 0 for layer in found.layers for value in [layer.kl[Width(3, 3)]] if kind == "float")
    if kind == "attention":
        assert [layer.name for layer in found.layers] == ["0.self_attn"]
        assert model[0].activation_relu_or_gelu == 1


def test_layers_of_a_quantized_network_are_tried_with_other_bits_than_theirs():
    model = backbones.resnet20(2, 2, width=4)
    found = sensitivity(model, [torch.randn(8, 3, 8, 8)], [2, 4], {"exclude": ["layer2", "layer3"]})
    assert found.layers[0].name == "layer1.0.conv1"
    for layer in found.layers:
        assert layer.kl[Width(2, 2)] == 0
        assert layer.kl[Width(4, 4)] > 0
    assert found.left_out["conv1"] == "first layer by registration"


def test_what_is_not_scored_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.unused, self.c = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    found = sensitivity(Net(), batches(1), [2])
    assert [layer.name for layer in found.layers] == ["b"]
    assert found.left_out["unused"] == "no batch reached it"
    assert "without scores: a: first layer" in str(found)


def test_bad_input_is_one_line():
    with pytest.raises(ValueError, match="batches: got none"):
        sensitivity(mlp(), [], [2])
    with pytest.raises(ValueError, match="bits: got 'x', allowed are 2 to 8"):
        sensitivity(mlp(), batches(), ["x"])
    with pytest.raises(ValueError, match="policy: got one without layers to score"):
        sensitivity(mlp(), batches(), [2], {"exclude": ["*"]})
    with pytest.raises(ValueError, match=r"weight_bits.* got 4, allowed is 2"):
        sensitivity(mlp(), batches(), [2, 4], {"weight_quantizer": "ternary", "weight_bits": 2})
    with pytest.raises(ValueError, match="outputs that are not finite"):
        sensitivity(mlp(), [torch.full((2, 8), float("nan"))], [2])
    with pytest.raises(ValueError, match="loss: got none, and Sequential returns no scores of classes"):
        sensitivity(nn.Sequential(*mlp(), nn.Linear(4, 1)), batches(), [2])


def test_a_regression_is_scored_by_its_loss():
    model = nn.Sequential(*mlp(), nn.Linear(4, 1))
    found = sensitivity(model, batches(), [2, 8], loss=lambda output, batch: output.square().mean())
    assert found.measures == ("loss",)
    chosen = allocate_bits(found, "mean_bits=uniform:8")
    assert chosen.by == "loss"


def test_the_policy_that_comes_out_converts_the_network():
    model = mlp()
    found = sensitivity(model, batches(), [2, 4], {"weight_quantizer": "lsq", **ALL})
    chosen = allocate_bits(found, "bitops=0.6*uniform:4")
    assert len(set(chosen.widths.values())) == 2
    quantize_model(model, chosen.to_policy().to_mapping())
    bits = {
        name: (m.weight_quantizer.bits, m.activation_quantizer.bits)
        for name, m in model.named_modules()
        if isinstance(m, QuantConv2d | QuantLinear)
    }
    assert bits == {name: tuple(w) for name, w in chosen.widths.items()}
