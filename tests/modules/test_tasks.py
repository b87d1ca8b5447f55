"""Float modules by task: what they compute, how they are quantized, and what they refuse."""

import builtins
import math
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_n2uq.callbacks import QuantizeModel
from lightning_n2uq.datamodules import (
    PythonDocsTextDataModule,
    ShapesDetectionDataModule,
    ShapesSegmentationDataModule,
    SyntheticSequencesDataModule,
)
from lightning_n2uq.modules import CausalLanguageModel, ObjectDetector, SemanticSegmenter, SequenceClassifier
from lightning_n2uq.modules.tasks.networks import PyramidHead

GPT2 = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
BERT = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 32, "initializer_range": 0.3}
W4A4 = {"weight_bits": 4, "activation_bits": 4, "activation_quantizer": "lsq_plus", "weight_quantizer": "lsq"}


def language_model(**options):
    return CausalLanguageModel("gpt2", {**GPT2, "bos_token_id": 0, "eos_token_id": 0}, **options)


def segmenter(**options):
    arguments = {"network": "timm/test_resnet", "num_classes": 4, "image_size": 32, **options}
    return SemanticSegmenter(**{"network_args": {"head_width": 8}, **arguments})


class Losses(QuantizeModel):
    """Keeps the training losses."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": 1}
    return Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[*callbacks], **{**quiet, **options})


CASES = {
    "segmentation": (
        lambda: segmenter(lr=0.01),
        lambda: ShapesSegmentationDataModule(
            image_size=32, num_train=64, num_val=8, num_test=8, batch_size=8
        ),
        {"val/loss", "val/miou", "val/acc"},
    ),
    "sequences": (
        lambda: SequenceClassifier("bert", 2, BERT, lr=0.01),
        lambda: SyntheticSequencesDataModule(2, 8, 16, num_train=384, num_val=16, num_test=16, batch_size=16),
        {"val/loss", "val/acc"},
    ),
    "language": (
        lambda: language_model(lr=0.01),
        lambda: PythonDocsTextDataModule(16, max_pieces=240, batch_size=8),
        {"val/loss", "val/perplexity"},
    ),
}


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES)
def test_it_learns_quantized_and_its_checkpoint_is_a_module_anew(case, tmp_path):
    make, data, logged = CASES[case]
    module, callback = make(), Losses(W4A4)
    run = trainer(tmp_path, callback)
    run.fit(module, data())
    assert logged <= set(run.callback_metrics)
    assert sum(callback.losses[-4:]) < 0.95 * sum(callback.losses[:4])
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    loaded = type(module).load_from_checkpoint(path)
    wanted, found = (trainer(tmp_path).predict(m, data()) for m in (module, loaded))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert set(trainer(tmp_path).test(loaded, data(), verbose=False)[0]) == {
        name.replace("val", "test") for name in logged
    }


@pytest.mark.integration
def test_a_detector_trains_quantized_and_logs_its_metric(tmp_path):
    small = {"min_size": 32, "max_size": 32}
    module = ObjectDetector(num_classes=4, image_size=32, network_args=small, metric="map")
    data = ShapesDetectionDataModule(image_size=32, num_train=4, num_val=2, num_test=2, batch_size=2)
    callback = Losses({**W4A4, "modules": ["net.roi_heads"]})
    run = trainer(tmp_path, callback)
    run.fit(module, data)
    assert 0 <= run.callback_metrics["val/map"] <= 1
    assert len(callback.losses) == 2
    assert set(callback.record.layers) == {"net.roi_heads.box_head.fc7"}  # fc6 is first, both heads are last
    found = trainer(tmp_path).predict(module, data)[0]
    assert [set(image) for image in found] == [{"boxes", "labels", "scores"}] * 2


@pytest.mark.parametrize(
    "network", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"]
)
def test_a_detector_has_a_loss_in_evaluation_mode_that_changes_nothing_in_it(network):
    size = {} if network.startswith("ssd") else {"min_size": 32, "max_size": 32}
    module = ObjectDetector(f"torchvision/{network}", num_classes=4, network_args=size, metric="iou").eval()
    box = {"boxes": torch.tensor([[2.0, 2.0, 20.0, 20.0]]), "labels": torch.tensor([1])}
    batch = ([torch.rand(3, 32, 32)], [box])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = module.training_loss(batch), module.training_loss(batch)
    assert torch.equal(first, again)
    assert float(first) > 0
    assert not any(part.training for part in module.net.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {*module(batch[0])[0]} == {"boxes", "labels", "scores"}


def test_overlap_counts_confident_detections():
    module = ObjectDetector(num_classes=4, network_args={"min_size": 32, "max_size": 32}, metric="iou")
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    detections = {
        "boxes": box.repeat(2, 1),
        "labels": torch.tensor([1, 1]),
        "scores": torch.tensor([0.9, 0.2]),
    }
    detections["boxes"][1] += 50

    class Sure(nn.Module):
        def forward(self, images):
            return [detections]

    module.net = Sure()
    half = [{"boxes": torch.tensor([[0.0, 0.0, 10.0, 5.0]]), "labels": torch.tensor([1])}]
    loss, found, targets = module.evaluate(([torch.zeros(3, 64, 64)], half))
    scores = module.metrics["val_scores"]
    scores.update(found, targets)
    assert loss is None
    assert scores.compute()["val/iou"] == pytest.approx(0.5)


def test_map_without_pycocotools_is_one_line(monkeypatch):
    monkeypatch.setattr("torchmetrics.detection.mean_ap._PYCOCOTOOLS_AVAILABLE", False)
    monkeypatch.setattr("torchmetrics.detection.mean_ap._FASTER_COCO_EVAL_AVAILABLE", False)
    with pytest.raises(ValueError, match=r"metric: got 'map', which needs pycocotools.*'iou' runs without"):
        ObjectDetector(num_classes=4, network_args={"min_size": 32, "max_size": 32})


def test_mean_overlap_is_over_the_pixels_of_an_epoch():
    scores = segmenter(num_classes=2).metrics["val_scores"]
    scores.update(torch.tensor([[[0, 0], [1, 1]]]), torch.tensor([[[0, 1], [1, 1]]]))
    scores.update(torch.tensor([[[0, 0], [0, 0]]]), torch.tensor([[[0, 0], [0, 1]]]))
    values = scores.compute()
    assert values["val/miou"] == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert values["val/acc"] == pytest.approx(6 / 8)


def test_ignored_pixels_count_nowhere():
    module = segmenter(ignore_index=3).eval()
    images = torch.randn(1, 3, 32, 32)
    classes = torch.randint(0, 3, (1, 32, 32))
    classes[0, :16] = 3
    loss, predicted, _ = module.evaluate((images, classes))
    lower = nn.functional.cross_entropy(module(images)[:, :, 16:], classes[:, 16:])
    torch.testing.assert_close(loss, lower)
    scores = module.metrics["val_scores"]
    scores.update(predicted, classes)
    assert scores.compute()["val/acc"] == (predicted == classes)[0, 16:].float().mean()


def test_the_auxiliary_head_counts_by_its_weight():
    class Two(nn.Module):
        def forward(self, images):
            return {"out": images[:, :2], "aux": images[:, 1:]}

    module = segmenter(num_classes=2, auxiliary_weight=0.25)
    module.net = Two()
    images, classes = torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 4, 4))
    losses = [nn.functional.cross_entropy(part, classes) for part in (images[:, :2], images[:, 1:])]
    torch.testing.assert_close(module.training_loss((images, classes)), losses[0] + 0.25 * losses[1])


def test_the_head_adds_coarse_maps_to_fine_ones():
    head = PyramidHead([2, 3, 4], 5, 6).eval()
    maps = [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4), torch.randn(1, 4, 2, 2)]
    assert head(maps).shape == (1, 6, 8, 8)
    for index in range(3):
        others = [m + 1 if i == index else m for i, m in enumerate(maps)]
        assert not torch.allclose(head(others), head(maps))


def test_every_token_is_predicted_from_those_before_it():
    module = language_model().eval()
    ids = torch.randint(0, 256, (2, 12))
    loss, logits, targets = module.evaluate({"input_ids": ids})
    assert torch.equal(targets, ids[:, 1:])
    scores = module.metrics["val_scores"]
    scores.update(logits, targets)
    assert scores.compute()["val/perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-4)
    other = ids.clone()
    other[:, 6:] = 0
    torch.testing.assert_close(module(other)[:, :6], module(ids)[:, :6])


def test_padding_counts_nowhere():
    module = language_model().eval()
    ids = torch.randint(0, 256, (1, 8))
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    loss, logits, targets = module.evaluate({"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(loss, module.evaluate({"input_ids": ids[:, :5]})[0])
    scores = module.metrics["val_scores"]
    scores.update(logits, targets)
    assert scores.compute()["val/perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-4)


def test_weights_of_transformers_are_loaded_from_a_folder(tmp_path):
    module = SequenceClassifier("bert", 3, BERT).eval()
    module.net.save_pretrained(tmp_path / "weights")
    loaded = SequenceClassifier(pretrained=str(tmp_path / "weights"), num_classes=3)
    assert loaded.net.training
    ids = torch.randint(0, 8, (2, 6))
    assert torch.equal(loaded.eval()(ids), module(ids))
    language = language_model()
    language.net.save_pretrained(tmp_path / "language")
    loaded = CausalLanguageModel(pretrained=str(tmp_path / "language"))
    assert torch.equal(loaded.net.transformer.wte.weight, language.net.transformer.wte.weight)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceClassifier(), r"model_type: got None with pretrained None, allowed is exactly one"),
        (lambda: SequenceClassifier("bert", pretrained="x"), r"model_type: got 'bert' with pretrained 'x'"),
        (lambda: CausalLanguageModel("nobert"), r"model_type: got 'nobert', allowed are families"),
        (lambda: CausalLanguageModel("gpt2", {"n_heads": 2}), r"config: got n_heads, allowed are .*n_head"),
        (lambda: CausalLanguageModel("vit", {"hidden_size": 8}), r"config: vit refuses"),
        (lambda: CausalLanguageModel("gpt2", {**GPT2, "n_head": 3}), r"config: gpt2 refuses .*n_head"),
        (lambda: CausalLanguageModel(pretrained="./nowhere"), r"pretrained: got './nowhere', allowed is a f"),
        (lambda: SemanticSegmenter("torchvision/resnet18"), r"network: got 'torchvision/resnet18', allowed"),
        (lambda: segmenter(network="timm/nothing"), r"network: got 'timm/nothing', timm has no model"),
        (
            lambda: segmenter(network_args={"depth": 3}),
            r"network: got 'timm/test_resnet' with .*timm refuses",
        ),
        (lambda: SemanticSegmenter(in_channels=1), r"in_channels: got 1, allowed is 3 with torchvision's"),
        (lambda: SemanticSegmenter(network_args={"x": 1}), r"network_args: got 'x', allowed are weights, "),
        (lambda: ObjectDetector("torchvision/fcn_resnet50"), r"network: got 'torchvision/fcn_resnet50', al"),
        (lambda: ObjectDetector("torchvision/maskrcnn_resnet50_fpn"), r"is one for boxes"),
        (lambda: segmenter(optimizer="lion"), r"optimizer: got 'lion', allowed"),
        (lambda: segmenter(lr=0.0), r"lr: got 0.0"),
        (lambda: segmenter(num_classes=1), r"num_classes: got 1"),
    ],
)
def test_what_is_impossible_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("package", "make"),
    [("transformers", lambda: CausalLanguageModel("gpt2", GPT2)), ("timm", lambda: segmenter())],
)
def test_a_missing_extra_is_named(package, make, monkeypatch):
    plain = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name == package:
            raise ImportError(name)
        return plain(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ValueError, match=rf"pip install '{package}>=[\d.]+'"):
        make()


def test_weights_decay_and_the_rest_does_not(tmp_path):
    module = language_model(weight_decay=0.3, lr=0.01)
    run = trainer(tmp_path, QuantizeModel(W4A4), limit_train_batches=1, limit_val_batches=0)
    run.fit(module, PythonDocsTextDataModule(16, max_pieces=20, batch_size=4))
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.3, "rest": 0.0, "rest/quantizer": 0.0
    }  # fmt: skip
    assert all(parameter.ndim > 1 for parameter in groups["weights"]["params"])
