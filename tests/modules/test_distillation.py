import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.modules.distillation import load_teacher, soft_cross_entropy

SMALL = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4}}
FLOAT = {
    "weight_quantizer": "float",
    "activation_quantizer": "float",
    "weight_bits": 32,
    "activation_bits": 32,
}


from_checkpoint = QuantizedClassifier.from_checkpoint


@pytest.fixture(scope="module")
def teacher_path(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.ckpt"
    model = QuantizedClassifier(**SMALL, **FLOAT)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, path)
    return str(path)


def test_soft_cross_entropy_follows_its_formula():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    for t in (1.0, 4.0):
        expected = -(t**2) * ((teacher / t).softmax(1) * (student / t).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(soft_cross_entropy(student, teacher, t), expected)


def test_gradient_vanishes_where_student_equals_teacher():
    logits = torch.randn(3, 5, requires_grad=True)
    soft_cross_entropy(logits, logits.detach().clone(), 2.0).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3, 5), atol=1e-6, rtol=0)


def test_teacher_guides_and_is_neither_trained_nor_saved(teacher_path, tmp_path):
    torch.manual_seed(0)
    model = QuantizedClassifier(**SMALL, teacher=teacher_path, temperature=2.0)
    names = set(model.state_dict())
    parameters = sum(1 for _ in model.parameters())
    run = Trainer(
        max_steps=2, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    run.fit(model, SyntheticDataModule(num_classes=10, in_channels=1, image_size=8, batch_size=16))
    (teacher,) = model._teacher
    assert set(model.state_dict()) == names
    assert sum(1 for _ in model.parameters()) == parameters
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    original = QuantizedClassifier.from_checkpoint(teacher_path).backbone.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in teacher.state_dict().items())

    images, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    logits = model(images)
    soft = soft_cross_entropy(logits, teacher(images), 2.0)
    torch.testing.assert_close(model._training_loss(images, logits, labels), soft)
    model.hparams.hard_label_weight = 0.25
    mixed = 0.25 * F.cross_entropy(logits, labels) + 0.75 * soft
    torch.testing.assert_close(model._training_loss(images, logits, labels), mixed)


def test_teachers_that_do_not_fit(teacher_path, monkeypatch):
    with pytest.raises(ValueError, match=r"teacher: .* has 10 classes, the student has 7"):
        load_teacher(teacher_path, 7, from_checkpoint)
    with pytest.raises(ValueError, match=r"teacher: no such file 'nowhere\.ckpt'"):
        load_teacher("nowhere.ckpt", 10, from_checkpoint)
    with pytest.raises(ValueError, match="teacher: got 'torchvision/resnet0'"):
        load_teacher("torchvision/resnet0", 1000, from_checkpoint)


def test_torchvision_teacher_without_network_is_explained(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    with pytest.raises(ValueError, match=r"teacher: weights of 'torchvision/resnet18' .*no route to host"):
        load_teacher("torchvision/resnet18", 1000, from_checkpoint)
