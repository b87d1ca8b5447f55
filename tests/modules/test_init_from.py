import logging

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.modules.checkpoints import load_matching, read_checkpoint

SMALL = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4}}


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("init") / "w4a4.ckpt"
    model = QuantizedClassifier(**SMALL, weight_bits=4, activation_bits=4)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return str(path)


def test_takes_over_what_fits_and_reports_the_rest(four_bits):
    model = QuantizedClassifier(**SMALL, num_classes=7)
    report = load_matching(model, four_bits)
    source = torch.load(four_bits, weights_only=True)["state_dict"]
    state = model.state_dict()
    assert all(torch.equal(state[name], source[name]) for name in report.loaded)
    assert len(report.loaded) + len(report.mismatched) == len(state)
    assert any("widths (15,) -> (3,)" in name for name in report.mismatched)
    text = report.summary()
    assert f"{len(report.loaded)} of {len(state)} entries loaded" in text
    assert "backbone.fc.weight (10, 16) -> (7, 16)" in text


def test_entries_of_one_side_only_are_named(four_bits):
    bits = {
        "weight_quantizer": "float",
        "activation_quantizer": "float",
        "weight_bits": 32,
        "activation_bits": 32,
    }
    report = load_matching(QuantizedClassifier(**SMALL, **bits), four_bits)
    assert report.missing == []
    assert any(name.endswith("widths") for name in report.unused)
    assert "in the source only, not used" in report.summary()


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema"])
def test_averaged_weights_beside_the_others_are_named(four_bits, tmp_path, key):
    content = torch.load(four_bits, weights_only=True)
    path = str(tmp_path / "both.ckpt")
    torch.save({**content, key: content["state_dict"]}, path)
    with pytest.warns(
        UserWarning, match=rf"^init_from: '.*both\.ckpt' also holds averaged weights \({key}\)"
    ):
        read_checkpoint(path, "init_from")


def fit(model, folder, **options):
    run = Trainer(
        max_steps=1, accelerator="cpu", logger=False, default_root_dir=folder, limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    run.fit(model, SyntheticDataModule(num_classes=10, in_channels=1, image_size=8, batch_size=16), **options)
    return run


def test_a_fit_starts_there_once_and_a_resumed_one_does_not(four_bits, tmp_path, caplog):
    source = torch.load(four_bits, weights_only=True)["state_dict"]["backbone.conv1.weight"]
    model = QuantizedClassifier(**SMALL, init_from=four_bits, lr=1e-9)
    with caplog.at_level(logging.INFO):
        run = fit(model, tmp_path)
    assert "entries loaded" in caplog.text
    torch.testing.assert_close(model.backbone.conv1.weight.detach(), source)
    model.backbone.conv1.weight.data.zero_()
    run.save_checkpoint(tmp_path / "zeros.ckpt")
    again = QuantizedClassifier(**SMALL, init_from=four_bits, lr=1e-9)
    fit(again, tmp_path, ckpt_path=str(tmp_path / "zeros.ckpt"))
    torch.testing.assert_close(
        again.backbone.conv1.weight.detach(), torch.zeros_like(source), atol=1e-6, rtol=0
    )


def test_files_that_do_not_serve(tmp_path):
    with pytest.raises(ValueError, match="init_from: no such file"):
        load_matching(QuantizedClassifier(**SMALL), str(tmp_path / "none.ckpt"))
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"teacher: .* is damaged, cut short, or no checkpoint"):
        read_checkpoint(str(tmp_path / "text.ckpt"), "teacher")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):
        read_checkpoint(str(tmp_path / "list.ckpt"))
    torch.save({"state_dict": {"x": torch.ones(1)}, "hyper_parameters": {"y": 1}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="init_from: nothing in"):
        load_matching(QuantizedClassifier(**SMALL), str(tmp_path / "other.ckpt"))
    with pytest.raises(ValueError, match="is no QuantizedClassifier of this version"):
        QuantizedClassifier.from_checkpoint(str(tmp_path / "other.ckpt"))
