import pytest
import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.convert import quantize_model
from lightning_n2uq.ops.dispatch import force, select
from lightning_n2uq.summary import main, summarize


def test_costs_are_those_of_the_formulas():
    model = backbones.resnet20(2, 3, num_classes=10, width=4)
    summary = summarize(model, (3, 8, 8))
    costs = {layer.name: layer for layer in summary.layers}
    conv = costs["layer1.0.conv1"]
    assert (conv.weight_method, conv.weight_bits, conv.activation_method, conv.activation_bits) == (
        "n2uq", 2, "n2uq", 3,
    )  # fmt: skip
    assert conv.macs == 8 * 8 * 4 * 4 * 9
    assert conv.bit_operations == conv.macs * 6
    assert conv.weight_bytes == 4 * 4 * 9 * 2 // 8 + 4 * 4  # codes, and a scale per channel
    assert conv.float_weight_bytes == 4 * 4 * 9 * 4
    strided = costs["layer2.0.conv1"]
    assert strided.macs == 4 * 4 * 8 * 4 * 9
    stem, last = summary.layers[0], summary.layers[-1]
    assert (stem.weight_bits, stem.activation_bits, stem.weight_method) == (32, 32, "float")
    assert stem.weight_bytes == stem.float_weight_bytes
    assert (last.macs, last.weight_bytes) == (160, 4 * 170)
    everything = sum(p.numel() for p in model.parameters())
    assert sum(x.weights + x.biases for x in summary.layers) + summary.other_parameters == everything
    assert summary.total("macs") == sum(layer.macs for layer in summary.layers)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_train_in_floats_are_named_with_the_reason():
    model = backbones.resnet20(2, 2, width=4, activation_quantizer="apot")
    text = str(summarize(model, (3, 8, 8)))
    assert (
        "training in floats here: layer1.0.conv1, layer1.0.conv2, layer1.1.conv1 and 17 more: activations of"
        in text
    )
    if select("integer", torch.device("cpu")) == "onednn":
        assert "training in floats" not in str(summarize(backbones.resnet20(2, 2, width=4), (3, 8, 8)))
    with force("numba"):
        assert "no integer arithmetic" in str(summarize(backbones.resnet20(2, 2, width=4), (3, 8, 8)))


def test_attention_and_linear_layers_are_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    before = {x.name: x.macs for x in summarize(model, (5, 8)).layers}
    assert before["1.self_attn"] == 4 * 5 * 8 * 8
    assert before["1.linear1"] == 5 * 8 * 16
    quantize_model(model, {"weight_quantizer": "lsq", "weight_bits": 4})
    after = summarize(model, (5, 8))
    assert {x.name: x.macs for x in after.layers} == before
    attention = next(x for x in after.layers if x.name == "1.self_attn")
    assert attention.weights == 4 * 8 * 8
    assert attention.weight_bytes == 4 * 8 * 8 // 2 + 4 * (2 + 4 * 8)  # two steps, biases in float32


def test_impossible_inputs_are_user_errors():
    with pytest.raises(ValueError, match=r"input_shape: got \[4, 8, 8\]"):
        summarize(nn.Sequential(nn.Conv2d(3, 2, 3)), (4, 8, 8))


def test_the_command_prints_the_configs_network(in_empty_folder, capsys):
    assert main(["--config", "digits/n2uq_w2a2", "--model.weight_bits", "4"]) == 0
    text = capsys.readouterr().out
    assert "layer3.2.conv2" in text
    assert "n2uq 4" in text
    assert "total" in text
    assert "evaluation on the CPU: the integer network, as deployed" in text
    assert not list(in_empty_folder.iterdir())


@pytest.mark.integration
def test_sizes_replace_data_that_are_elsewhere(in_empty_folder, capsys):
    config = ["--config", "imagenet/n2uq_resnet18_w2a2"]
    with pytest.raises(ValueError, match="without the data, give --image_size N"):
        main(config)
    assert main([*config, "--num_classes", "1000", "--in_channels", "3", "--image_size", "224"]) == 0
    assert "1,814,073,344" in capsys.readouterr().out  # the known number for ResNet-18
    with pytest.raises(ValueError, match="config: got none"):
        main([])


def test_summary_leaves_the_random_numbers_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 4))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    summarize(model, (4,))
    assert torch.equal(torch.rand(1), expected)


def test_grids_of_integer_only_networks_are_counted():
    model = backbones.resnet20(num_classes=10, width=4, residual_bits=8, first_last_bits=8)
    summary = summarize(model, (3, 8, 8))
    assert {(x.weight_method, x.weight_bits) for x in (summary.layers[0], summary.layers[-1])} == {
        ("grid", 8)
    }
    assert summary.layers[0].macs == 8 * 8 * 4 * 3 * 9
    assert len(summary.grids) == 11
    assert "maps between blocks: on 11 learned grids of 8 bits" in str(summary)
    assert "learned grids" not in str(summarize(backbones.resnet20(width=4), (3, 8, 8)))


@pytest.mark.parametrize("method", ["statsq", "seq", "ternary", "binary", "ewgs"])
def test_scales_are_counted_per_channel_where_there_is_one_for_each(method):
    bits = 1 if method == "binary" else 2
    model = backbones.resnet20(bits, 2, width=4, weight_quantizer=method, activation_quantizer="lsq")
    layer = next(x for x in summarize(model, (3, 8, 8)).layers if x.name == "layer1.0.conv1")
    assert layer.scales == (1 if method == "ewgs" else 4)


def test_other_convolutions_and_recurrent_layers_are_counted():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ConvTranspose1d(8, 6, 2, 2), nn.LSTM(8, 5, batch_first=True))
    model[1].register_forward_hook(lambda m, args, out: out[..., :8])
    quantize_model(model, {"skip_first": False, "skip_last": False, "weight_bits": 3})
    costs = summarize(model, (4, 9)).layers
    assert [x.macs for x in costs] == [7 * 8 * 4 * 3, 8 * 7 * 6 * 2, 6 * (4 * 5 * (8 + 5))]
    assert [x.weight_bits for x in costs] == [3, 3, 3]
    assert costs[2].biases == 2 * 4 * 5


def test_quantized_products_of_attention_are_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 8))
    quantize_model(model, {"activation_bits": 4, "attention_bits": 3, "attention_quantizer": "lsq"})
    cost = next(x for x in summarize(model, (5, 8)).layers if x.name == "1.self_attn.products")
    assert (cost.weight_method, cost.weight_bits, cost.activation_method, cost.activation_bits) == (
        "lsq", 3, "lsq", 3,
    )  # fmt: skip
    assert cost.macs == 2 * 5 * 5 * 8  # queries with keys, and probabilities with values
    assert cost.bit_operations == cost.macs * 9
    assert cost.weight_bytes == 0
