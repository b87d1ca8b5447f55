"""Files of weights that other code wrote: wrappers, keys, compiled networks."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_n2uq import backbones
from lightning_n2uq.backbones.pretrained import load_pretrained
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.modules.checkpoints import load_matching
from lightning_n2uq.utils.state_dicts import KEYS

SMALL = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4}}
LEADS = ("", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "model.", "model.backbone._orig_mod.")


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(5)
    return QuantizedClassifier(**SMALL).backbone.state_dict()


def same(model, source):
    return all(torch.equal(value, source[name]) for name, value in model.backbone.state_dict().items())


@pytest.mark.parametrize("lead", LEADS)
def test_what_wraps_a_network_is_taken_off_its_names(source, tmp_path, lead):
    path = str(tmp_path / "w.pt")
    torch.save({lead + name: value for name, value in source.items()}, path)
    model = QuantizedClassifier(**SMALL)
    report = load_matching(model, path)
    assert same(model, source)
    assert (report.missing, report.mismatched, report.unused) == ([], [], [])


@pytest.mark.parametrize("key", KEYS)
def test_a_networks_weights_are_found_under_the_usual_keys(source, tmp_path, key):
    path = str(tmp_path / "w.pt")
    torch.save({"epoch": 3, "optimizer": {"state": {}}, key: dict(source)}, path)
    model = QuantizedClassifier(**SMALL)
    load_matching(model, path)
    assert same(model, source)


def test_averaged_weights_serve_where_there_are_no_others_and_are_named_beside_others(source, tmp_path):
    alone, both = str(tmp_path / "ema.pt"), str(tmp_path / "both.pt")
    torch.save({"epoch": 3, "model_ema": dict(source)}, alone)
    model = QuantizedClassifier(**SMALL)
    load_matching(model, alone)
    assert same(model, source)
    torch.save({"model_ema": {"conv1.weight": torch.zeros(1)}, "model": dict(source)}, both)
    model = QuantizedClassifier(**SMALL)
    with pytest.warns(UserWarning, match=r"also holds averaged weights \(model_ema\): not used"):
        load_matching(model, both)
    assert same(model, source)


def test_of_two_copies_in_one_state_dict_the_first_serves_and_the_other_is_named(source, tmp_path):
    path = str(tmp_path / "w.pt")
    state = {f"student.{name}": value for name, value in source.items()}
    state |= {f"teacher.{name}": torch.zeros_like(value) for name, value in source.items()}
    torch.save({"state_dict": state}, path)
    model = QuantizedClassifier(**SMALL)
    report = load_matching(model, path)
    assert same(model, source)
    assert report.unused == sorted(f"teacher.{name}" for name in source)


def test_names_of_torchvision_are_found_behind_a_wrapper():
    torch.manual_seed(6)
    floats = {"weight_quantizer": "float", "activation_quantizer": "float", "weight_bits": 32}
    real = backbones.build("mobilenet_v2", num_classes=5, activation_bits=32, **floats)
    bare = {name.replace("fc.", "classifier.1."): value for name, value in real.state_dict().items()}
    target = backbones.build("mobilenet_v2", num_classes=5)
    report = load_pretrained(target, {"model": {f"module._orig_mod.{name}": v for name, v in bare.items()}})
    assert report.unused == []
    assert torch.equal(target.fc.weight, real.fc.weight)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "it holds a list"),
        ({"epoch": 1}, "no state dict in it; allowed is one, bare or under 'state_dict', "),
        (
            {"generator": {"a": torch.ones(1)}, "critic": {"b": torch.ones(1)}},
            "several, 'generator', 'critic'",
        ),
        ({"x": torch.ones(1)}, "nothing in"),
    ],
)
def test_files_without_the_networks_weights(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"init_from: .*{message}"):
        load_matching(QuantizedClassifier(**SMALL), str(tmp_path / "w.pt"))


def test_steps_fitted_to_unknown_bits_are_fitted_anew(tmp_path):
    lsq = {**SMALL, "activation_quantizer": "lsq", "weight_quantizer": "lsq"}
    torch.save(QuantizedClassifier(**lsq).backbone.state_dict(), tmp_path / "w.pt")
    report = load_matching(QuantizedClassifier(**lsq), str(tmp_path / "w.pt"))
    assert any("activation_quantizer" in name and "another bit width" in name for name in report.mismatched)


def compiled(model):
    model.backbone = torch.compile(model.backbone, backend="eager")
    return model


@pytest.mark.integration
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("theirs", [False, True])
def test_a_checkpoint_of_a_compiled_network_loads_into_either(tmp_path, ours, theirs):
    torch.manual_seed(7)
    model = QuantizedClassifier(**SMALL, integer_evaluation="off")
    wanted = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    run = Trainer(accelerator="cpu", default_root_dir=tmp_path, limit_test_batches=1, **quiet)
    run.strategy.connect(compiled(model) if theirs else model)
    path = str(tmp_path / "c.ckpt")
    run.save_checkpoint(path)
    target = QuantizedClassifier(**SMALL, integer_evaluation="off")
    target = compiled(target) if ours else target
    data = SyntheticDataModule(num_classes=10, in_channels=1, image_size=8, batch_size=16)
    run = Trainer(accelerator="cpu", default_root_dir=tmp_path, limit_test_batches=1, **quiet)
    run.test(target, data, ckpt_path=path)
    network = (
        target.backbone._orig_mod if isinstance(target.backbone, nn.Module) and ours else target.backbone
    )
    assert all(torch.equal(value, wanted[name]) for name, value in network.state_dict().items())
    if not ours:
        again = QuantizedClassifier.from_checkpoint(path)
        assert all(torch.equal(value, wanted[name]) for name, value in again.backbone.state_dict().items())
