import copy
import logging
import pickle

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_n2uq.export import ExactNetwork, describe
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.ops.dispatch import force

INTEGER = "the integer network, as deployed"


def classifier(**options):
    torch.manual_seed(0)
    settings = {"backbone": "resnet20", "num_classes": 5, "in_channels": 2, "image_size": 8}
    model = QuantizedClassifier(**settings, backbone_args={"width": 4}, **options)
    with torch.no_grad():
        for seed in range(3):
            model.train().backbone(images(8, seed))
    return model.eval()


def images(count=6, seed=7):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def deployed(model, x):
    return ExactNetwork(describe(model, (2, 8, 8)))(x)


def assert_deployed(model, x=None):
    x = images() if x is None else x
    with torch.no_grad():
        logits = model(x)
        assert torch.equal(logits, deployed(model, x))
    assert model.evaluation() == INTEGER
    return logits


def assert_plain(model, reason, x=None):
    x = images() if x is None else x
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.backbone(x), rtol=0, atol=0, equal_nan=True)
    assert reason in model._integer.obstacle


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("weight", ["n2uq", "lsq", "dorefa"])
@pytest.mark.parametrize("activation", ["n2uq", "lsq", "lsq_plus", "pact"])
def test_evaluation_runs_the_network_that_is_deployed(bits, weight, activation):
    model = classifier(
        weight_bits=bits, activation_bits=bits, weight_quantizer=weight, activation_quantizer=activation
    )
    assert_deployed(model)


def test_a_loaded_checkpoint_evaluates_as_deployed(tmp_path):
    model = classifier()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "net.ckpt", weights_only=False)
    loaded = QuantizedClassifier.load_from_checkpoint(tmp_path / "net.ckpt", map_location="cpu").eval()
    logits = loaded(images())
    assert torch.equal(logits, deployed(model, images()))
    assert torch.equal(logits, assert_deployed(model))


def change_by_optimizer(model):
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    model.backbone(images()).logsumexp(1).sum().backward()
    optimizer.step()


def change_by_state_dict(model):
    state = {key: value + 0.2 * torch.rand_like(value) for key, value in model.state_dict().items()
             if value.is_floating_point()}  # fmt: skip
    model.load_state_dict({**model.state_dict(), **state})


def change_statistics(model):
    model.backbone.bn1.running_mean.add_(0.5)


def change_pointers(model):
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def change_a_parameter(model):
    model.backbone.fc.bias = nn.Parameter(torch.rand(5))


def change_a_layer(model):
    model.backbone.relu = nn.ReLU6().eval()


def change_a_setting(model):
    for module in model.backbone.modules():
        if hasattr(module, "rescale"):
            module.rescale = False


CHANGES = [
    change_by_optimizer,
    change_by_state_dict,
    change_statistics,
    change_pointers,
    change_a_parameter,
    change_a_layer,
    change_a_setting,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_network_is_deployed_anew(change):
    model = classifier()
    before = assert_deployed(model)
    change(model)
    after = assert_deployed(model)
    if change is not change_a_layer:
        assert not torch.equal(before, after)


def test_an_unchanged_network_is_kept():
    model = classifier()
    with torch.no_grad():
        model(images())
        first = model.deployed(images())
        model(images(3))
        assert model.deployed(images()) is first


def test_another_size_of_the_images_is_another_network():
    model = classifier()
    x = torch.randn(2, 2, 16, 16)
    assert_deployed(model)
    with torch.no_grad():
        assert torch.equal(model(x), ExactNetwork(describe(model, (2, 16, 16)))(x))


def test_switched_off_the_plain_modules_run():
    assert_plain(classifier(integer_evaluation="off"), "integer_evaluation off")


def test_a_wrong_choice_is_refused():
    with pytest.raises(ValueError, match=r"integer_evaluation: got 'fast', allowed (are|is) auto, off"):
        classifier(integer_evaluation="fast")


def test_what_has_no_deployed_form_runs_as_plain_modules():
    assert_plain(classifier(weight_quantizer="apot"), "has no integer levels")
    assert_plain(
        classifier(
            weight_quantizer="float", activation_quantizer="float", weight_bits=32, activation_bits=32
        ),
        "without quantized layers",
    )
    assert_plain(classifier().double(), "images of torch.float64", images().double())
    with force("reference"):
        assert_plain(classifier(), "reference kernels")


def test_quantizers_that_were_never_fitted_run_as_plain_modules_until_they_are():
    torch.manual_seed(0)
    model = QuantizedClassifier(
        backbone="resnet20", in_channels=2, image_size=8, weight_quantizer="lsq", activation_quantizer="lsq"
    ).eval()
    assert_plain(model, "never initialised")
    model.train().backbone(images())
    assert_deployed(model.eval())


def test_a_part_in_training_mode_runs_as_plain_modules():
    model = classifier()
    assert_deployed(model)
    model.backbone.layer1[0].bn1.train()
    x, state = images(), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(x)
        model.load_state_dict(state)
        assert torch.equal(logits, model.backbone(x))


def test_hooks_inside_the_network_see_every_call():
    model, seen = classifier(), []
    assert_deployed(model)
    hook = model.backbone.layer2[1].conv1.register_forward_hook(lambda *call: seen.append(call))
    assert_plain(model, "hooks")
    assert len(seen) == 2
    hook.remove()
    assert_deployed(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_show_in_the_logits(value):
    model, x = classifier(), images()
    x[2, 0, 1, 1] = value
    assert_plain(model, "not finite", x)
    with torch.no_grad():
        assert model(x)[2].isnan().any() == (value != value)


def test_weights_that_are_not_finite_show_in_the_logits():
    model = classifier()
    with torch.no_grad():
        model.backbone.layer1[0].conv1.weight[0] = float("nan")
        assert model(images()).isnan().any()


def test_gradients_are_those_of_the_plain_modules():
    model, x = classifier(), images()
    assert torch.equal(model(x).detach(), deployed(model, x))
    model(x).square().sum().backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    logits = model.backbone(x)
    logits.backward(2 * deployed(model, x))
    for name, expected in model.named_parameters():
        assert (expected.grad is None) == (found[0] is None), name
        torch.testing.assert_close(found.pop(0), expected.grad, rtol=0, atol=0)


def test_gradients_of_images_are_there():
    model, x = classifier(), images().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert "require a gradient" in model._integer.obstacle


def test_inference_mode_and_autocast_change_nothing():
    model = classifier()
    expected = deployed(model, images())
    with torch.inference_mode():
        assert torch.equal(model(images()), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images()), expected)
    assert torch.equal(model(images()), expected)


def test_copies_and_pickles_evaluate_as_deployed():
    model = classifier()
    expected = assert_deployed(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(assert_deployed(other), expected)
        change_statistics(other)
        assert_deployed(other)
    assert torch.equal(assert_deployed(model), expected)


@pytest.mark.integration
def test_compiled_calls_and_exported_programs_see_the_plain_modules():
    model = classifier()
    program = torch.export.export(model, (images(),))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images()), model.backbone(images()))
    model.backbone.compile(backend="eager")
    assert_plain(model, "torch.compile")


def loader():
    labels = torch.randint(5, (24,), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(images(24), labels), batch_size=8)


def trainer(tmp_path, **options):
    parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys(parts, False)
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **{**quiet, **options})


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
def test_the_accuracy_of_every_loop_is_the_deployed_networks(tmp_path, caplog, precision):
    model = classifier(lr=0.01)
    run = trainer(tmp_path, max_epochs=2, precision=precision, enable_model_summary=True)
    with caplog.at_level(logging.INFO):
        run.fit(model.train(), loader(), loader())
    scores = {"val/acc": float(run.callback_metrics["val/acc"])}
    scores["test/acc"] = run.test(model, loader(), verbose=False)[0]["test/acc"]
    x, labels = loader().dataset.tensors
    right = (deployed(model, x).argmax(1) == labels).float().mean().item()
    assert scores == {"val/acc": pytest.approx(right), "test/acc": pytest.approx(right)}
    predicted = torch.cat([part["probabilities"] for part in run.predict(model, loader())])
    assert torch.equal(predicted, torch.cat([deployed(model, part).softmax(1) for part in x.split(8)]))
    assert [r.getMessage() for r in caplog.records if "evaluation:" in r.getMessage()] == [
        f"evaluation: {INTEGER}"
    ]


def test_steps_that_no_batch_has_fitted_yet_are_no_news_before_training(tmp_path, caplog):
    settings = {"backbone": "resnet20", "num_classes": 5, "in_channels": 2, "image_size": 8, "lr": 0.01}
    lsq = {"weight_quantizer": "lsq", "activation_quantizer": "lsq", "backbone_args": {"width": 4}}
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, max_epochs=1).fit(QuantizedClassifier(**settings, **lsq), loader(), loader())
    said = [r.getMessage() for r in caplog.records if "evaluation:" in r.getMessage()]
    assert said == [f"evaluation: {INTEGER}"]


def test_weights_written_past_torch_are_seen_by_the_next_evaluation(tmp_path):
    model, run = classifier(), trainer(tmp_path)
    run.validate(model, loader(), verbose=False)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.data.mul_(-1.5)
    run.validate(model, loader(), verbose=False)
    assert_deployed(model)
