"""Averages of weights: beside a schedule of widths refused, and on resume said to end elsewhere."""

import pytest
import torch
from lightning.pytorch import Trainer, callbacks

from lightning_n2uq.callbacks import ThresholdAnnealing
from lightning_n2uq.checkpointing import ExactResume
from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier

SHAPE = {"num_classes": 4, "image_size": 8, "in_channels": 1}
AVERAGES = [lambda: callbacks.StochasticWeightAveraging(1e-3)]
if hasattr(callbacks, "EMAWeightAveraging"):
    AVERAGES.append(callbacks.EMAWeightAveraging)


def fit(folder, *extra, ckpt_path=None, epochs=2, model=None):
    runner = Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=epochs, callbacks=[*extra], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = SyntheticDataModule(batch_size=16, num_train=32, num_val=16, **SHAPE)
    runner.fit(model or QuantizedClassifier(**SHAPE), data, ckpt_path=ckpt_path)
    return runner


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_beside_a_schedule_of_widths_are_refused(tmp_path, average):
    line = "bits: got a schedule of widths beside .*WeightAveraging, allowed is one of the two"
    with pytest.raises(ValueError, match=line):
        fit(tmp_path, ThresholdAnnealing(bits=[8, 4, 2], bits_at=[0.0, 0.3, 0.6]), average())


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_with_stochastic_averages_says_that_it_ends_elsewhere(tmp_path):
    runner = fit(tmp_path, ExactResume(str(tmp_path)), callbacks.StochasticWeightAveraging(1e-3), epochs=1)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="StochasticWeightAveraging: .* ends elsewhere than"):
        fit(
            tmp_path,
            ExactResume(str(tmp_path)),
            callbacks.StochasticWeightAveraging(1e-3),
            ckpt_path=str(tmp_path / "a.ckpt"),
        )


@pytest.mark.integration
@pytest.mark.parametrize("method", ["n2uq", "lsq", "lsq_plus", "pact", "apot", "dorefa"])
def test_torch_exports_a_batch_of_any_size(method):
    weights = method if method != "pact" else "n2uq"
    model = QuantizedClassifier(activation_quantizer=method, weight_quantizer=weights, **SHAPE)
    model(torch.randn(4, 1, 8, 8))
    network = model.backbone.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(network, (torch.randn(3, 1, 8, 8),), dynamic_shapes=({0: batch},))
    for size in (2, 5):
        x = torch.randn(size, 1, 8, 8)
        torch.testing.assert_close(program.module()(x), network(x))
