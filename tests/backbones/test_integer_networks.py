import pytest
import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.backbones.blocks import BasicBlock
from lightning_n2uq.interop import official_names
from lightning_n2uq.layers import BiasedPReLU, QuantConv2d, QuantLinear
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.modules.checkpoints import load_matching
from lightning_n2uq.quantizers import UniformGrid

OPTIONS = {"residual_bits": 8, "first_last_bits": 8}


def network(name="resnet20", **arguments):
    torch.manual_seed(0)
    small = {"width": 4} if name == "resnet20" else {}
    return backbones.build(name, num_classes=5, **{**small, **OPTIONS, **arguments})


def grids(model):
    return [name for name, module in model.named_modules() if isinstance(module, UniformGrid)]


def test_options_are_off_by_default_and_zero_is_off():
    default = backbones.build("resnet20", num_classes=5, width=4)
    off = network(residual_bits=0, first_last_bits=0)
    assert not grids(default)
    assert default.state_dict().keys() == off.state_dict().keys()
    assert type(default.conv1) is nn.Conv2d


def test_both_branches_of_every_sum_share_one_grid_and_both_ends_are_quantized():
    model = network()
    assert isinstance(model.conv1, QuantConv2d)
    assert isinstance(model.fc, QuantLinear)
    blocks = [module for module in model.modules() if isinstance(module, BasicBlock)]
    assert all(isinstance(block.grid, UniformGrid) and block.grid.signed for block in blocks)
    assert len(grids(model)) == 9 + 2 + 4  # sums, stem and last map, weight and input of both ends


def test_each_option_works_alone():
    x = torch.randn(4, 3, 16, 16)
    for option in OPTIONS:
        model = network(**{**dict.fromkeys(OPTIONS), option: 8}).train()
        model(x).sum().backward()
        assert model.eval()(x).dtype == torch.float32


@pytest.mark.integration
@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "mobilenet_v2"])
def test_every_parameter_learns_and_evaluation_is_near_training(name):
    model = network(name).train()
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model(x).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the same statistics on both paths, which then differ by roundings only
    trained = model(x)
    torch.testing.assert_close(model.eval()(x), trained, rtol=0, atol=0.02 * trained.abs().max().item())


def test_evaluation_does_not_depend_on_batch_size_or_memory_layout():
    model = network().train()
    x = torch.randn(6, 3, 16, 16)
    model(x)
    model.eval()
    expected = model(x)
    assert torch.equal(torch.cat([model(part) for part in x.split(1)]), expected)
    assert torch.equal(model(x.to(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), expected)


def test_maps_between_blocks_are_integers_times_a_step():
    model = network().train()
    x = torch.randn(4, 3, 16, 16)
    model(x)
    model.eval()
    seen = {}
    block = model.layer2[1]
    block.act_out.register_forward_pre_hook(lambda _, inputs: seen.update(total=inputs[0]))
    model(x)
    integers = seen["total"] / block.grid.step()
    torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-9)
    assert integers.abs().max() <= 127


def test_negative_slopes_count_as_zero_and_still_learn():
    act = BiasedPReLU(2, monotone=True)
    with torch.no_grad():
        act.slope.copy_(torch.tensor([-0.5, 0.5]))
    x = torch.full((1, 2, 1, 1), -2.0)
    y = act(x)
    assert y.flatten().tolist() == [0.0, -1.0]
    y.sum().backward()
    assert act.slope.grad.tolist() == [-2.0, -2.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"residual_bits": 4}, "residual_bits: got 4, allowed are null, 0 and 8"),
        ({"first_last_bits": True}, "first_last_bits: got True"),
        ({"activation_quantizer": "lsq_plus"}, "activation_quantizer: got 'lsq_plus', allowed with resid"),
        ({"weight_quantizer": "apot"}, "weight_quantizer: got 'apot', allowed with residual_bits 8"),
        ({"quantize_downsample": False}, "quantize_downsample: got False, allowed with residual_bits 8"),
    ],
)
def test_impossible_combinations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        network(**arguments)


def test_networks_of_other_libraries_refuse_the_options():
    with pytest.raises(ValueError, match="residual_bits: got 8, allowed is null with backbone 'torchvision/"):
        QuantizedClassifier("torchvision/resnet18", residual_bits=8)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_published_format_does_not_know_them(option):
    model = network(**{**dict.fromkeys(OPTIONS), option: 8})
    with pytest.raises(
        ValueError, match="belongs to an integer-only network, which the format does not know"
    ):
        official_names(model)


def test_a_run_that_starts_from_such_a_network_keeps_its_grids(tmp_path):
    source = QuantizedClassifier(backbone_args={"width": 4}, weight_bits=4, activation_bits=4, **OPTIONS)
    source.train()(torch.randn(4, 3, 32, 32))
    path = tmp_path / "source.ckpt"
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": dict(source.hparams)}, path)
    target = QuantizedClassifier(backbone_args={"width": 4}, **OPTIONS)
    load_matching(target, str(path))
    for name, value in source.state_dict().items():
        if "log2_range" in name or "initialized" in name:
            assert torch.equal(target.state_dict()[name], value), name


def test_the_classifier_keeps_the_options_in_its_checkpoint(tmp_path):
    model = QuantizedClassifier(backbone_args={"width": 4}, **OPTIONS)
    assert {name: model.hparams[name] for name in OPTIONS} == OPTIONS
    x = torch.randn(4, 3, 32, 32)
    model.train()(x)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    again = QuantizedClassifier.from_checkpoint(str(path)).eval()
    assert torch.equal(again(x), model.eval()(x))
