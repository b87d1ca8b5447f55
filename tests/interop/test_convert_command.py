import pytest
import torch
from published_format import PublishedNetwork

from lightning_n2uq.interop.command import main
from lightning_n2uq.modules import QuantizedClassifier


@pytest.fixture(scope="module")
def published():
    return PublishedNetwork("resnet18", 2, quantize_downsample=False)


@pytest.fixture
def source(published, tmp_path):
    path = tmp_path / "published.pth.tar"
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in published.state.items()}}, path)
    return str(path)


@pytest.mark.integration
def test_published_checkpoints_become_ours_and_go_back_exactly(source, published, tmp_path, capsys):
    ours, back = str(tmp_path / "ours.ckpt"), str(tmp_path / "back.pth.tar")
    assert main([source, ours, "--arch", "resnet18", "--bits", "2"]) == 0
    assert f"{source} -> {ours}" in capsys.readouterr().out
    model = QuantizedClassifier.from_checkpoint(ours).eval()
    assert (model.num_classes, model.hparams.quantize_downsample) == (7, False)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model.double()(images), published(images), rtol=1e-8, atol=1e-8)
    assert main([ours, back]) == 0
    content = torch.load(back, weights_only=True)["state_dict"]
    assert content.keys() == {f"module.{key}" for key in published.state}
    assert all(torch.equal(content[f"module.{key}"], value) for key, value in published.state.items())


@pytest.mark.integration
def test_lightning_loads_what_it_writes(source, tmp_path):
    ours = tmp_path / "ours.ckpt"
    main([source, str(ours), "--arch", "resnet18", "--bits", "2"])
    model = QuantizedClassifier.load_from_checkpoint(ours, weights_only=True)
    assert model.hparams.weight_bits == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "2"], "--arch: is needed"),
        (["--arch", "resnet18"], "--bits: is needed"),
        (["--arch", "resnet18", "--bits", "3"], "does not fit the model"),
        (["--arch", "resnet18", "--bits", "2", "--quantize-downsample"], "does not fit the model"),
    ],
)
def test_mistakes_are_user_errors_and_write_nothing(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main([source, str(tmp_path / "out.ckpt"), *options])
    assert not (tmp_path / "out.ckpt").exists()


def test_files_are_checked_first(source, tmp_path):
    with pytest.raises(ValueError, match="IN: no such file"):
        main([str(tmp_path / "absent"), "out"])
    with pytest.raises(ValueError, match=r"OUT: .* exists already"):
        main([source, source, "--arch", "resnet18", "--bits", "2"])
    (tmp_path / "junk").write_bytes(b"x")
    with pytest.raises(ValueError, match="IN: cannot read"):
        main([str(tmp_path / "junk"), str(tmp_path / "out")])
