"""Layers besides Conv2d and Linear: the float layer's values, quantized values, training, reports."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.convert.more_layers import more_quantized
from lightning_n2uq.layers import QuantSpec
from lightning_n2uq.quantizers.positions import level_position

FLOAT = QuantSpec(32, 32, "float", "float")


class Conv1D(nn.Module):
    """As in transformers.pytorch_utils."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


CONVOLUTIONS = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, 1, groups=2, padding_mode="reflect"), (2, 4, 11)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding="same", bias=False), (2, 4, 5, 6, 7)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, output_padding=1), (2, 4, 7)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2), (2, 4, 5, 6)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 4, 5)),
    "Conv1D": (lambda: Conv1D(6, 5), (2, 3, 5)),
}
METHODS = ["n2uq", "lsq", "dorefa", "apot", "seq", "nulsq"]


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = CONVOLUTIONS[name]
    return build(), torch.randn(shape)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_without_quantizers_the_values_are_those_of_the_float_layer(name: str) -> None:
    layer, x = built(name)
    torch.testing.assert_close(more_quantized(layer, FLOAT)(x), layer(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_value_is_the_layer_of_quantized_weights_and_inputs(name: str, method: str) -> None:
    layer, x = built(name)
    new = more_quantized(layer, QuantSpec(3, 3, method, "n2uq" if method == "seq" else method)).train()
    y = new(x)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.copy_(new.weight_quantizer(layer.weight))
        torch.testing.assert_close(y, twin(new.activation_quantizer(x)))
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in new.parameters())
    assert torch.isfinite(new.eval()(x)).all()


@pytest.mark.parametrize("name", ["ConvTranspose1d", "ConvTranspose2d", "Conv1D"])
def test_channels_are_output_channels(name: str) -> None:
    layer, x = built(name)
    groups = getattr(layer, "groups", 1)
    new = more_quantized(layer, QuantSpec(2, 2, "n2uq", "n2uq"))
    new(x)
    quantized = new.weight_quantizer(layer.weight)
    for group in range(groups):
        rows = quantized.unflatten(0, (groups, -1))[group]
        for channel in range(rows.shape[1]):
            assert len(rows[:, channel].abs().unique()) <= 2  # two magnitudes of 4 levels around zero
    codes = new.weight_quantizer.codes(layer.weight)
    assert codes.shape == layer.weight.shape
    position = level_position(new.weight_quantizer, layer.weight)
    assert torch.equal(
        new.weight_quantizer.inner.codes(new.weight_quantizer.channels_first(layer.weight)).int(),
        position.round().int(),
    )
    assert more_quantized(layer, QuantSpec(2, 2, "seq", "lsq")).weight_quantizer.inner.alpha.numel() == 6


def test_a_transposed_convolution_takes_an_output_size() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, 2, padding=1)
    x = torch.randn(1, 4, 5, 5)
    new = more_quantized(layer, QuantSpec(4, 4))
    assert new(x, output_size=[10, 10]).shape == layer(x, output_size=[10, 10]).shape == (1, 6, 10, 10)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_networks_are_converted_with_the_keys_of_the_float_network(name: str) -> None:
    layer, x = built(name)
    network = nn.Sequential(
        OrderedDict(first=nn.Identity(), body=layer, pool=nn.Flatten(), last=nn.LazyLinear(3))
    )
    wanted = network(x).detach()
    keys = set(network.state_dict())
    policy = {"weight_bits": 8, "activation_bits": 8, "skip_first": False, "weight_quantizer": "lsq_plus"}
    report = quantize_model(network, policy, [x], example=x)
    assert report.quantized == ["body"]
    assert keys <= set(network.state_dict())
    assert report.of("quantized")[0].input_range is not None
    assert ((network.eval()(x) - wanted).norm() / wanted.norm()) < 0.05
    other = copy.deepcopy(network)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


def test_rules_by_type() -> None:
    network = nn.Sequential(
        nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.LSTM(4, 4), nn.Conv1d(4, 4, 1)
    )
    policy = {"skip_first": False, "skip_last": False, "weight_bits": 5}
    rules = [{"type": "transposed", "weight_bits": 4}, {"type": "recurrent", "weight_bits": 3}]
    report = quantize_model(network, {**policy, "rules": rules})
    assert [line.weight for line in report.layers] == ["n2uq 5", "n2uq 4", "n2uq 3", "n2uq 5"]


# Standardized weights


@pytest.mark.parametrize("kind", ["ScaledStdConv2d", "ScaledStdConv2dSame", "StdConv2d", "StdConv2dSame"])
def test_standardized_convolutions_of_timm(kind: str) -> None:
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    for size in (9, 10):
        layer = getattr(layers, kind)(4, 6, 3, 2).requires_grad_()
        if hasattr(layer, "gain"):
            nn.init.uniform_(layer.gain, 0.5, 1.5)
        x = torch.randn(2, 4, size, size)
        torch.testing.assert_close(more_quantized(layer, FLOAT)(x), layer(x))
        network = nn.Sequential(nn.Identity(), layer)
        policy = {"skip_first": False, "skip_last": False, "weight_bits": 8, "activation_bits": 8}
        policy |= {"weight_quantizer": "lsq_plus"}
        wanted = layer(x).detach()
        assert quantize_model(network, policy, [x]).quantized == ["1"]
        assert (network(x) - wanted).norm() / wanted.norm() < 0.05
        network(x).square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        levels = network[1].weight_quantizer(network[1].effective_weight) / network[1].weight_quantizer.step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)


# Recurrent layers


def recurrent(mode: str, **options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = getattr(nn, mode)(5, 7, **options)
    return layer, more_quantized(layer, FLOAT)


def assert_same(found: object, wanted: object) -> None:
    if isinstance(wanted, tuple):
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, Tensor):
        torch.testing.assert_close(found, wanted)
    else:
        assert found is wanted


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"batch_first": True, "bias": False, "num_layers": 2},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_without_quantizers_are_torchs(mode: str, options: dict) -> None:
    layer, new = recurrent(mode, **options)
    x = torch.randn(4, 6, 5)
    assert_same(new(x), layer(x))
    assert_same(new(x[0]), layer(x[0]))
    _, states = layer(x)
    assert_same(new(x, states), layer(x, states))


@pytest.mark.parametrize("sorted_already", [True, False])
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_packed_sequences(mode: str, sorted_already: bool) -> None:
    layer, new = recurrent(mode, num_layers=2, bidirectional=True)
    lengths = [6, 4, 1] if sorted_already else [1, 6, 4]
    x = pack_padded_sequence(torch.randn(6, 3, 5), lengths, enforce_sorted=sorted_already)
    (out, state), (wanted, wanted_state) = new(x), layer(x)
    assert_same(pad_packed_sequence(out), pad_packed_sequence(wanted))
    assert_same(state, wanted_state)
    states = layer(x)[1]
    assert_same(new(x, states)[1], layer(x, states)[1])


def test_rnn_with_relu() -> None:
    layer, new = recurrent("RNN", nonlinearity="relu")
    assert_same(new(torch.ones(3, 2, 5)), layer(torch.ones(3, 2, 5)))


@pytest.mark.parametrize("mode", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_without_quantizers_are_torchs(mode: str) -> None:
    layer, new = recurrent(mode)
    x = torch.randn(4, 5)
    state = layer(x)
    assert_same(new(x), state)
    assert_same(new(x, state), layer(x, state))
    assert_same(new(x[0]), layer(x[0]))


class Tagger(nn.Module):
    def __init__(self, mode: str, **options) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 5)
        self.body = getattr(nn, mode)(5, 16, **options)
        self.last = nn.Linear(16 * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.embed(x))[0])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mode", "options"), [("LSTM", {"bidirectional": True, "num_layers": 2}), ("GRU", {})]
)
def test_quantized_recurrent_networks_stay_close_and_train(mode: str, options: dict) -> None:
    torch.manual_seed(0)
    network, x = Tagger(mode, **options), torch.randn(7, 8, 5)
    keys, wanted = set(network.state_dict()), network(x).detach()
    report = quantize_model(network, {"weight_bits": 8, "activation_bits": 8}, [x])
    assert report.quantized == ["body"]
    assert report.of("quantized")[0].input_range is not None
    assert keys <= set(network.state_dict())
    assert (network.eval()(x) - wanted).norm() / wanted.norm() < 0.05
    network.train()
    optimizer, target = torch.optim.Adam(network.parameters(), 0.01), (x.cumsum(0)[..., :3] > 0).float()
    losses = []
    for _ in range(60):
        loss = nn.functional.binary_cross_entropy_with_logits(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is not None for p in network.parameters())


def test_hidden_states_are_quantized() -> None:
    layer = nn.GRU(5, 7)
    new = more_quantized(layer, QuantSpec(4, 2, "lsq", "lsq"))
    seen = []
    new.hidden_quantizers[0].register_forward_hook(lambda m, args, out: seen.append(out))
    new(torch.randn(6, 3, 5))
    assert len(seen) == 5  # a state that starts at zero needs none
    assert len(torch.cat(seen).unique()) <= 4


def test_what_cannot_be_converted_has_a_reason() -> None:
    class Own(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    class OwnLSTM(nn.LSTM):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    network = nn.Sequential(nn.LSTM(4, 4, proj_size=2), Own(4, 4, 1), OwnLSTM(4, 4), nn.Linear(4, 4))
    policy = {"skip_first": False, "skip_last": False}
    report = quantize_model(network, policy)
    assert [line.reason for line in report.of("unsupported")] == [
        "it projects its hidden state (proj_size)",
        "Own computes its own forward",
        "OwnLSTM computes its own forward",
    ]
    again = quantize_model(network, policy)
    assert again.of("unsupported")[-1].reason == "is quantized already"


def test_hugging_faces_gpt2_is_quantized() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    network = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 50, (2, 8))
    wanted = network(tokens).logits.detach()
    policy = {"weight_bits": 8, "activation_bits": 8, "skip_first": False}
    report = quantize_model(network, policy, [tokens])
    assert len(report.quantized) == 8
    assert all("c_" in name for name in report.quantized)
    error = (network.eval()(tokens).logits - network.eval()(tokens).logits.clone()).abs().max()
    assert error == 0
    assert torch.isfinite(network(tokens).logits).all()
    assert wanted.shape == network(tokens).logits.shape
