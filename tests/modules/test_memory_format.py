"""`memory_format` reaches the network's weights and maps, and changes no value."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier

SMALL = {"in_channels": 3, "image_size": 8, "backbone_args": {"width": 4}}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("chosen", FORMATS)
@pytest.mark.parametrize("given", FORMATS)
def test_weights_images_and_maps_have_the_chosen_order(chosen: str, given: str) -> None:
    model = QuantizedClassifier(**SMALL, memory_format=chosen)
    maps: list[Tensor] = []
    for name in ("conv1", "layer1.0.conv1", "layer3.0.conv2"):
        layer = model.backbone.get_submodule(name)
        layer.register_forward_hook(lambda _, inputs, y: maps.extend((inputs[0], y)))
        assert layer.weight.is_contiguous(memory_format=FORMATS[chosen])
    model(torch.randn(2, 3, 8, 8).contiguous(memory_format=FORMATS[given]))
    assert len(maps) == 6
    assert all(value.is_contiguous(memory_format=FORMATS[chosen]) for value in maps)


def test_another_order_is_the_same_network() -> None:
    model = QuantizedClassifier(**SMALL).eval()
    other = QuantizedClassifier(**SMALL, memory_format="channels_last").eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(model(x), other(x), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_goes_on_in_another_order(tmp_path) -> None:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    data = SyntheticDataModule(num_classes=10, in_channels=3, image_size=8, batch_size=8)
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "limit_val_batches": 0, **quiet}
    trainer = Trainer(max_steps=1, **options)
    trainer.fit(QuantizedClassifier(**SMALL, memory_format="channels_last"), data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    model = QuantizedClassifier(**SMALL, memory_format="contiguous")
    Trainer(max_steps=2, **options).fit(model, data, ckpt_path=str(tmp_path / "model.ckpt"))
    assert all(p.is_contiguous() for p in model.parameters())


def test_a_teacher_has_the_order_of_the_student(tmp_path) -> None:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    data = SyntheticDataModule(num_classes=10, in_channels=3, image_size=32, batch_size=4)
    path = tmp_path / "teacher.ckpt"
    teacher = QuantizedClassifier(**{**SMALL, "image_size": 32})
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "limit_val_batches": 0, "max_steps": 1}
    trainer = Trainer(**options, **quiet)
    trainer.fit(teacher, data)
    trainer.save_checkpoint(path)
    student = QuantizedClassifier(
        **{**SMALL, "image_size": 32}, memory_format="channels_last", teacher=str(path)
    )
    Trainer(**options, **quiet).fit(student, data)
    weight = student._teacher[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_an_unknown_order_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"memory_format: got 'nhwc', allowed are contiguous, channels_last"):
        QuantizedClassifier(**SMALL, memory_format="nhwc")
