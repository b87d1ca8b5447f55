"""A network of the user's own as `backbone`: by import path, or registered under a name."""

import sys

import pytest
import torch
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.backbones import own
from lightning_n2uq.cli import main
from lightning_n2uq.layers import QuantConv2d
from lightning_n2uq.modules import QuantizedClassifier

MODULE = """
from torch import nn
from lightning_n2uq.backbones import register

class Small(nn.Module):
    def __init__(self, num_classes, in_channels, width=8):
        super().__init__()
        if width == 13:
            raise RuntimeError("thirteen is no width")
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images):
        return self.head(self.middle(self.stem(images).relu()).relu().mean((2, 3)))

@register("wide")
def wide(num_classes, in_channels):
    return Small(num_classes, in_channels, 16)

def unregistered(num_classes):
    return Small(num_classes, 1)

number = 3
"""
FIT = [
    "fit", "--config", "digits/n2uq_w4a4.yaml", "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu",
    "--trainer.enable_model_summary", "false", "--wandb", "disabled",
]  # fmt: skip


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module, as the current one."""
    (tmp_path / "own_net.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(own, "_REGISTERED", {})
    for name in ("own_net", "other_net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    sys.modules.pop("own_net", None)


def test_a_class_by_import_path_is_quantized_by_the_bits(mine):
    model = QuantizedClassifier(backbone="own_net.Small", in_channels=1, image_size=8, weight_bits=3)
    layer = model.backbone.middle
    assert isinstance(layer, QuantConv2d)
    assert layer.weight_quantizer.bits == 3
    assert isinstance(model.backbone.stem, nn.Conv2d)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_registered_function_is_known_by_name_and_by_path(mine):
    import own_net

    for name in ("wide", "own_net.wide"):
        network = backbones.build(name, num_classes=4, in_channels=1, weight_bits=2, activation_bits=2)
        assert network.head.in_features == own_net.wide(4, 1).head.in_features == 16


def test_one_that_takes_bits_quantizes_itself(mine):
    @backbones.register("by_bits")
    def by_bits(num_classes: int, weight_bits: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + weight_bits))

    network = backbones.build("by_bits", num_classes=4, in_channels=1, weight_bits=2, activation_bits=2)
    assert network(torch.zeros(1, 3)).shape == (1, 6)
    with pytest.raises(ValueError, match=r"got policy, by_bits takes num_classes, weight_bits$"):
        QuantizedClassifier(backbone="by_bits", backbone_args={"policy": {}})


def test_arguments_of_a_float_network_stand_among_the_backbones(mine):
    model = QuantizedClassifier(backbone="own_net.Small", in_channels=1, backbone_args={"width": 5})
    assert model.backbone.head.in_features == 5
    with pytest.raises(ValueError, match=r"backbone 'own_net\.Small': .*'widht'"):
        QuantizedClassifier(backbone="own_net.Small", in_channels=1, backbone_args={"widht": 5})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_net.nothing", "which is nothing of that name; allowed are classes of modules"),
        ("own_net.number", "which is a int; allowed"),
        ("own_net.unregistered", r"which is a function; allowed .*register\(NAME\)"),
        ("os.system", "which is a builtin_function_or_method; allowed"),
        ("no_such_module.Net", r"cannot import 'no_such_module' \(ModuleNotFoundError: No module named"),
        ("resnet21", "allowed are mobilenet_v2, resnet18, .*, timm/<model>, or the import path of"),
    ],
)
def test_what_is_no_network_is_named(mine, name, message):
    with pytest.raises(ValueError, match=f"backbone: got '{name}', {message}"):
        backbones.build(name, num_classes=4, in_channels=1)


@pytest.mark.parametrize("name", ["resnet20", "a.b", "a/b"])
def test_names_that_are_taken_or_impossible_are_refused(name):
    with pytest.raises(ValueError, match=r"name: got .* allowed is an identifier"):
        backbones.register(name)


def test_it_trains_from_the_command_line(mine, capsys):
    assert main([*FIT, "--model.backbone", "own_net.Small"]) == 0, capsys.readouterr().err


def test_a_bug_of_the_users_is_shown_with_file_and_line(mine, capsys):
    arguments = ["--model.backbone_args", "{model_args: {width: 13}}"]
    assert main([*FIT, "--model.backbone", "own_net.Small", *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "RuntimeError: thirteen is no width (own_net.py:9 in __init__)" in line
    (mine / "other_net.py").write_text("import torch\nimport no_such_package\n")
    assert main([*FIT, "--model.backbone", "other_net.Small"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No module named 'no_such_package'" in line
    assert "other_net.py:2" in line
