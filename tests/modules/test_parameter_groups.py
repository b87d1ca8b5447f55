import pytest
import torch

from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.modules.optimizers import build_optimizer, parameter_groups
from lightning_n2uq.quantizers import quantizer_parameters


@pytest.mark.parametrize("method", ["n2uq", "lsq", "lsq_plus"])
def test_every_parameter_is_in_the_right_group(method):
    model = QuantizedClassifier(activation_quantizer=method, backbone_args={"width": 4})
    groups = {g["name"]: g for g in parameter_groups(model.backbone, 0.01, 1e-4, 0.1)}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [
        (0.001, 0.0),
        (0.01, 1e-4),
        (0.01, 0.0),
    ]
    members = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    assert sum(map(len, members.values())) == len(list(model.parameters()))
    assert members["quantizer"] == {id(p) for _, p in quantizer_parameters(model)}
    assert all(p.ndim > 1 for p in groups["weights"]["params"])
    assert id(model.backbone.conv1.weight) in members["weights"]
    assert id(model.backbone.fc.bias) in members["rest"]


def test_float_networks_have_no_quantizer_group_and_frozen_parameters_none_at_all():
    bits = {
        "weight_quantizer": "float",
        "activation_quantizer": "float",
        "weight_bits": 32,
        "activation_bits": 32,
    }
    model = QuantizedClassifier(**bits, backbone_args={"width": 4})
    model.backbone.fc.requires_grad_(False)
    groups = parameter_groups(model.backbone, 0.01, 0.0, 0.1)
    assert [group["name"] for group in groups] == ["weights", "rest"]
    held = {id(p) for group in groups for p in group["params"]}
    assert id(model.backbone.fc.weight) not in held


def test_optimizers_by_name():
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "name": "weights", "lr": 0.5, "weight_decay": 0.1}
    ]
    options = {"lr": 0.5, "momentum": 0.8, "betas": (0.7, 0.9)}
    sgd = build_optimizer("sgd", groups, **options)
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.defaults["momentum"] == 0.8
    assert type(build_optimizer("adam", groups, **options)) is torch.optim.Adam
    adamw = build_optimizer("adamw", groups, **options)
    assert type(adamw) is torch.optim.AdamW
    assert adamw.defaults["betas"] == (0.7, 0.9)
    with pytest.raises(ValueError, match="optimizer: got 'rmsprop', allowed are adam, adamw, sgd"):
        build_optimizer("rmsprop", groups, **options)
