import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

SMALL = {"in_channels": 1, "image_size": 8, "backbone_args": {"width": 4}}


def trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, **{"max_steps": 2, **quiet, **options})


def data():
    return SyntheticDataModule(num_classes=10, in_channels=1, image_size=8, batch_size=16)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fit")
    model = QuantizedClassifier(**SMALL, weight_decay=1e-4, betas=(0.8, 0.99))
    run = trainer(folder, max_steps=-1, max_epochs=1, limit_train_batches=2)
    run.fit(model, data())
    run.save_checkpoint(folder / "model.ckpt")
    return model, run, str(folder / "model.ckpt")


def test_logs_the_named_metrics_and_a_confusion_matrix(fitted, tmp_path):
    model, run, _ = fitted
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "val/acc5"} <= set(run.callback_metrics)
    counted = model.metrics["val_confusion"].compute()
    assert counted.shape == (10, 10)
    accuracy = counted.diag().sum() / counted.sum()
    torch.testing.assert_close(accuracy, run.callback_metrics["val/acc"])
    results = trainer(tmp_path).test(model, data(), verbose=False)[0]
    assert set(results) == {"test/loss", "test/acc", "test/acc5"}


def test_top_5_is_kept_apart_from_top_1():
    model = QuantizedClassifier(**SMALL)
    scores = model.metrics["val_scores"]
    labels = torch.arange(10)
    scores.update(F.one_hot(labels).float(), labels)  # all right: both metrics have equal states
    scores.update(torch.linspace(1, 0, 10).repeat(10, 1), labels)  # class 0 first: 1 of 10, and 5 of 10
    values = scores.compute()
    assert values["val/acc"].item() == pytest.approx(11 / 20)
    assert values["val/acc5"].item() == pytest.approx(15 / 20)


def test_few_classes_have_no_top_5():
    assert set(QuantizedClassifier(**SMALL, num_classes=5).metrics["val_scores"].keys()) == {"val/acc"}


@pytest.mark.integration
def test_checkpoint_holds_plain_values_and_reloads_outside_of_lightning(fitted):
    model, _, path = fitted
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["betas"] == [0.8, 0.99]
    model.eval()
    images = torch.randn(4, 1, 8, 8)
    for loaded in (QuantizedClassifier.load_from_checkpoint(path), QuantizedClassifier.from_checkpoint(path)):
        assert torch.equal(loaded.eval()(images), model(images))
        assert loaded.hparams.backbone_args == {"width": 4}


def test_predict_gives_probabilities_and_labels(fitted, tmp_path):
    model = fitted[0]
    batches = trainer(tmp_path).predict(model, data())
    assert batches[0]["probabilities"].shape == (16, 10)
    torch.testing.assert_close(batches[0]["probabilities"].sum(1), torch.ones(16))
    assert torch.equal(batches[0]["labels"], batches[0]["probabilities"].argmax(1))
    images = torch.randn(2, 1, 8, 8)
    assert model.predict_step(images, 0)["labels"].shape == (2,)


def test_example_input_fits(fitted):
    model = fitted[0]
    assert model(model.example_input_array).shape == (2, 10)


def test_a_non_finite_loss_is_not_hidden():
    model = QuantizedClassifier(**SMALL)
    model.backbone.fc.weight.data.fill_(torch.nan)
    images, labels = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    assert model._training_loss(images, model(images), labels).isnan()


def test_linear_schedule_reaches_zero_after_the_last_step(tmp_path):
    model = QuantizedClassifier(**SMALL, lr=0.01, quantizer_lr_multiplier=0.5)
    rates = []
    model.on_train_batch_start = lambda *_: rates.append([g["lr"] for g in model.optimizers().param_groups])
    run = trainer(tmp_path, max_steps=4)
    run.fit(model, data())
    assert rates == [pytest.approx([0.005 * f, 0.01 * f, 0.01 * f]) for f in (1, 0.75, 0.5, 0.25)]
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.0, 0.0, 0.0]


def test_plain_pytorch_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = QuantizedClassifier(**SMALL)
    F.cross_entropy(model(torch.randn(32, 1, 8, 8)), torch.randint(10, (32,))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    quantizers = [m for m in model.modules() if isinstance(m, LearnableThresholdQuantizer)]
    assert all(q.widths.grad.abs().sum() > 0 for q in quantizers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_bits": 9}, "weight_bits: got 9"),
        ({"activation_bits": 1}, "activation_bits: got 1"),
        ({"weight_quantizer": "x"}, "weight_quantizer: got 'x'"),
        ({"activation_quantizer": "x"}, "activation_quantizer: got 'x'"),
        ({"backbone": "x"}, "backbone: got 'x'"),
        ({"backbone_args": {"num_classes": 3}}, "backbone_args: got num_classes"),
        ({"num_classes": 1}, "num_classes: got 1, allowed are integers from 2"),
        ({"optimizer": "lion"}, "optimizer: got 'lion', allowed are adam, adamw, sgd"),
        ({"schedule": "step"}, "schedule: got 'step', allowed are linear, cosine, constant, published"),
        ({"lr": 0.0}, "lr: got 0.0, allowed is above 0"),
        ({"lr": float("nan")}, "lr: got nan, allowed is above 0"),
        ({"label_smoothing": 1.5}, "label_smoothing: got 1.5, allowed is 0 to 1"),
        ({"hard_label_weight": -0.1}, "hard_label_weight: got -0.1"),
        ({"temperature": 0}, "temperature: got 0, allowed is above 0"),
        ({"warmup_steps": -1}, "warmup_steps: got -1, allowed are integers from 0"),
        ({"betas": (0.9, 2.0)}, r"betas: got \[0.9, 2.0\], allowed are two numbers"),
        ({"betas": [0.9]}, r"betas: got \[0.9\], allowed are two numbers"),
    ],
)
def test_impossible_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizedClassifier(**{**SMALL, **arguments})
