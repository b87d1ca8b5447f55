import pytest
import torch
from torchvision import models

from lightning_n2uq import backbones
from lightning_n2uq.backbones.pretrained import load_pretrained


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_torchvision_weights_load_by_name(name):
    state = models.get_model(name, weights=None).state_dict()
    model = backbones.build(name, weight_bits=4, activation_bits=4)
    before = model.state_dict()
    expansion = {k for k in before if k.startswith(("features.1.conv1.w", "features.1.bn1"))}
    before = {key: value.clone() for key, value in before.items()}
    report = load_pretrained(model, state)
    assert len(report.loaded) == len(state)
    assert set(report.missing) == expansion
    assert report.unused == report.mismatched == []
    after = model.state_dict()
    assert {*report.loaded, *report.added, *report.missing} == set(after)
    assert all(torch.equal(after[key], before[key]) for key in (*report.added, *report.missing))
    assert sum(float(after[key].double().sum()) for key in report.loaded) == pytest.approx(
        sum(float(value.double().sum()) for value in state.values())
    )


def test_the_loaded_float_network_computes_what_torchvisions_does():
    source = models.mobilenet_v2(weights=None, num_classes=4).eval()
    arguments = {"weight_quantizer": "float", "activation_quantizer": "float"}
    model = backbones.mobilenet_v2(32, 32, **arguments, num_classes=4).eval()
    load_pretrained(model, source.state_dict())
    x = torch.randn(2, 32, 16, 16)
    # The activations differ (ReLU6 against PReLU), so the parts are compared one by one.
    theirs, ours = source.features[1].conv, model.features[1]
    torch.testing.assert_close(ours.bn2(ours.conv2(x)), theirs[0][1](theirs[0][0](x)))
    torch.testing.assert_close(ours.bn3(ours.conv3(x)), theirs[2](theirs[1](x)))
    theirs, ours = source.features[2].conv, model.features[2]
    torch.testing.assert_close(ours.bn1(ours.conv1(x[:, :16])), theirs[0][1](theirs[0][0](x[:, :16])))


def test_misfits_and_leftovers_are_named(tmp_path):
    state = models.resnet18(weights=None).state_dict()
    state["head.weight"] = torch.zeros(1)
    del state["layer1.0.bn1.weight"]
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "real.pt")
    model = backbones.resnet18(num_classes=10)
    report = load_pretrained(model, tmp_path / "real.pt")
    assert report.missing == ["layer1.0.bn1.weight"]
    assert report.mismatched == ["fc.weight (1000, 512) -> (10, 512)", "fc.bias (1000,) -> (10,)"]
    assert report.unused == ["head.weight"]
    text = report.summary()
    assert all(part in text for part in ("real.pt", "layer1.0.bn1.weight", "fc.weight", "head.weight"))


def test_shortcuts_counted_from_one_are_the_published_starting_points():
    state = models.resnet18(weights=None).state_dict()
    shifted = {
        key.replace("downsample.1.", "downsample.2.").replace("downsample.0.", "downsample.1."): value
        for key, value in state.items()
    }
    model = backbones.resnet18()
    assert load_pretrained(model, shifted).unused == []
    assert torch.equal(model.layer2[0].downsample[0].weight, state["layer2.0.downsample.0.weight"])


def test_sources_that_cannot_be_read_are_user_errors(tmp_path):
    model = backbones.resnet20(width=4)
    (tmp_path / "junk").write_bytes(b"x")
    for source, message in (
        (tmp_path / "absent", "no such file"),
        (tmp_path / "junk", "cannot read"),
        ({}, "no state dict"),
        ({"other": torch.zeros(1)}, "nothing in"),
        ("torchvision/nope", "no classification model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_pretrained(model, source)
