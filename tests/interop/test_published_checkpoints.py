import pytest
import torch
from published_format import PublishedNetwork

from lightning_n2uq import backbones
from lightning_n2uq.interop import (
    load_official_checkpoint,
    official_state_dict,
    save_official_checkpoint,
)

CASES = [
    ("resnet18", 2, True),
    pytest.param("resnet18", 2, False, marks=pytest.mark.integration),
    pytest.param("resnet18", 3, True, marks=pytest.mark.integration),
    pytest.param("resnet34", 3, True, marks=pytest.mark.integration),
    pytest.param("resnet50", 4, False, marks=pytest.mark.integration),
    ("mobilenet_v2", 4, True),
]


def ours(arch, bits, quantize_downsample=True, **kwargs):
    arguments = {"weight_bits": bits, "activation_bits": bits, "num_classes": 7, **kwargs}
    return backbones.build(arch, quantize_downsample=quantize_downsample, **arguments)


@pytest.fixture(scope="module")
def published18():
    return PublishedNetwork("resnet18", 2)


@pytest.mark.parametrize(("arch", "bits", "quantize_downsample"), CASES)
def test_logits_and_state_dict_are_the_published_ones(arch, bits, quantize_downsample):
    published = PublishedNetwork(arch, bits, quantize_downsample)
    model = ours(arch, bits, quantize_downsample).eval()
    load_official_checkpoint(published.state, model)
    back = official_state_dict(model)
    assert back.keys() == published.state.keys()
    for key, value in published.state.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value), key
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = published(images), model.double()(images)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_nested_and_prefixed_files_are_the_same(published18, tmp_path, nested, prefix):
    state = {prefix + key: value for key, value in published18.state.items()}
    torch.save(
        {"state_dict": state, "epoch": 3, "best_top1_acc": torch.tensor(69.4)} if nested else state,
        tmp_path / "a.pt",
    )
    model = ours("resnet18", 2)
    report = load_official_checkpoint(tmp_path / "a.pt", model)
    assert len(report.loaded) == len(model.state_dict())
    assert len(report.constants) == 19 * 7
    assert str(tmp_path / "a.pt") in report.summary()
    assert torch.equal(model.layer1[0].act1.bias_in, published18.state["layer1.0.bias11.bias"].flatten())


def test_written_files_read_back_exactly(tmp_path):
    model, again = ours("resnet18", 3), ours("resnet18", 3)
    save_official_checkpoint(model, tmp_path / "out.pt", epoch=5)
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert content["epoch"] == 5
    assert all(key.startswith("module.") for key in content["state_dict"])
    assert content["state_dict"]["module.layer2.0.downsample.0.eps"].item() == pytest.approx(1e-3)
    load_official_checkpoint(tmp_path / "out.pt", again)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_a_misfit_is_refused_wholly_and_named(published18):
    model = ours("resnet18", 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer1\.0\.quan1\.a \(3,\) instead of \(7,\)"):
        load_official_checkpoint(published18.state, model)
    with pytest.raises(ValueError, match=r"unknown .*layer2\.0\.downsample\.0\.a"):
        load_official_checkpoint(published18.state, ours("resnet18", 2, False))
    state = {**published18.state, "extra.weight": torch.zeros(1)}
    del state["layer3.1.quan2.start"]
    with pytest.raises(ValueError, match=r"missing \(1\): layer3\.1\.quan2\.start; unknown \(1\): extra"):
        load_official_checkpoint(state, ours("resnet18", 2))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_constant_with_another_value_is_another_network(published18):
    state = {**published18.state, "layer1.0.conv1.clip_val": torch.tensor([3.0])}
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1\.clip_val \[3\.0\] instead of \[2\]"):
        load_official_checkpoint(state, ours("resnet18", 2))


def test_missing_norm_counters_start_at_zero(published18):
    state = {k: v for k, v in published18.state.items() if not k.endswith("num_batches_tracked")}
    model = ours("resnet18", 2)
    model.bn1.num_batches_tracked.fill_(3)
    report = load_official_checkpoint(state, model)
    assert len(report.counters) == 20
    assert model.bn1.num_batches_tracked == 0
    assert "counters" in report.summary()


def test_unreadable_files_and_unsuitable_models_are_user_errors(tmp_path, published18):
    model = ours("resnet18", 2)
    (tmp_path / "junk.pt").write_bytes(b"no checkpoint")
    torch.save({"epoch": 1}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="no such file"):
        load_official_checkpoint(tmp_path / "absent.pt", model)
    with pytest.raises(ValueError, match="cannot read"):
        load_official_checkpoint(tmp_path / "junk.pt", model)
    with pytest.raises(ValueError, match="no state dict"):
        load_official_checkpoint(tmp_path / "empty.pt", model)
    with pytest.raises(ValueError, match="got Linear"):
        load_official_checkpoint(published18.state, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="LSQ"):
        load_official_checkpoint(published18.state, ours("resnet18", 2, activation_quantizer="lsq"))
