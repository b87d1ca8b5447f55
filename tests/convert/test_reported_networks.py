"""Networks and orders of calls that users of other libraries reported as broken."""

import warnings

import lightning.pytorch as pl
import pytest
import torch

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier

SHAPE = {"image_size": 8, "in_channels": 1, "num_classes": 4}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("test_resnet", {"features_only": True}),
        ("test_efficientnet", {"features_only": True}),
        ("test_vit", {"img_size": 32, "drop_path_rate": 0.3}),
    ],
)
def test_features_and_stochastic_depth_of_timm_train(name, arguments):
    timm = pytest.importorskip("timm", reason="timm is an extra")
    network = timm.create_model(name, **arguments).train()
    quantize_model(network)
    torch.manual_seed(0)
    for _ in range(3):  # a block that is dropped for every image of one batch has its turn in another
        found = network(torch.randn(8, 3, 32, 32))
        maps = found if isinstance(found, list) else [found]
        sum(each.sum() for each in maps).backward()
    assert [key for key, value in network.named_parameters() if value.grad is None] == []
    assert all(torch.isfinite(each).all() for each in maps)


@pytest.mark.integration
@pytest.mark.parametrize("method", ["n2uq", "lsq"])
def test_a_network_trains_after_it_was_validated(method, tmp_path):
    """Validation runs in inference mode, whose tensors autograd refuses: none of them may stay."""
    model = QuantizedClassifier(weight_quantizer=method, activation_quantizer=method, **SHAPE)
    data = SyntheticDataModule(batch_size=8, **SHAPE)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=2, limit_val_batches=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.validate(model, data, verbose=False)
        trainer.fit(model, data)
    assert trainer.global_step == 2
    assert not any(value.is_inference() for value in model.state_dict(keep_vars=True).values())
