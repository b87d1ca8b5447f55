import shutil
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader, TensorDataset

from lightning_n2uq.callbacks import QuantizationMonitor, ThresholdAnnealing, TorchCompile
from lightning_n2uq.cli import main
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import ACTIVATION_QUANTIZERS

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of torch's compiler, about itself


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def images(count=24):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long())


def train(folder, *callbacks, batch_size=8, epochs=2, one_stage=False, one_layer=False, **options):
    """A trained network of one block per stage, and the warnings.

    One stage, with a stride and a quantized shortcut, is a third of the compiler's work; one quantized layer
    is a third of that.
    """
    seed_everything(1, verbose=False)
    model = QuantizedClassifier(
        backbone="resnet20", num_classes=2, in_channels=1, image_size=8, backbone_args={"width": 4}, **options
    )
    for stage in (model.backbone.layer1, model.backbone.layer2, model.backbone.layer3):
        del stage[1:]
    if one_layer:
        model.backbone.layer2 = nn.Sequential(model.backbone.layer2[0].conv1)
    if one_stage or one_layer:
        model.backbone.layer1, model.backbone.layer3 = nn.Identity(), nn.Identity()
        model.backbone.fc = nn.Linear(8, 2)
    runner = Trainer(
        default_root_dir=folder, callbacks=list(callbacks), max_epochs=epochs, accelerator="cpu",
        logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader(images(), batch_size=batch_size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner.fit(model, loader, loader)
    return model, [str(w.message) for w in caught if "TorchCompile" in str(w.message)]


def compiled(**options):
    return TorchCompile(backend="aot_eager", **options)


def equal(one, two):
    other = two.state_dict()
    assert one.state_dict().keys() == other.keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other[name]), name


@pytest.mark.integration
def test_a_compiled_network_trains_to_the_same_weights_under_the_same_names(tmp_path):
    callback = compiled()
    model, messages = train(tmp_path, callback)
    plain, _ = train(tmp_path)
    equal(model, plain)
    assert callback.calls == {"compiled": 6, "uncompiled": 0}
    assert counters["stats"]["unique_graphs"] == 1
    assert not messages
    assert model.backbone._compiled_call_impl is None


@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(set(ACTIVATION_QUANTIZERS) - {"float"}))
def test_every_quantizer_trains_compiled(tmp_path, name):
    bits = {} if name != "binary" else {"activation_bits": 1}
    callback = compiled()
    model, _ = train(tmp_path, callback, one_layer=True, activation_quantizer=name, **bits)
    plain, _ = train(tmp_path, one_layer=True, activation_quantizer=name, **bits)
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[key], rtol=1e-4, atol=1e-5), key
    assert callback.calls["compiled"] == 6


@pytest.mark.integration
def test_a_smaller_last_batch_is_compiled_on_its_own(tmp_path):
    model, _ = train(tmp_path, compiled(), batch_size=9, one_layer=True)
    plain, _ = train(tmp_path, batch_size=9, one_layer=True)
    equal(model, plain)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.integration
def test_the_monitor_sees_what_it_sees_without(tmp_path):
    callback, monitor = compiled(), QuantizationMonitor(every_n_steps=4, dirpath=str(tmp_path / "a"))
    train(tmp_path, callback, monitor, one_stage=True)
    plain = QuantizationMonitor(every_n_steps=4, dirpath=str(tmp_path / "b"))
    train(tmp_path, plain, one_stage=True)
    assert monitor.records == plain.records
    assert all(record.activation is not None for record in monitor.records)
    # The first step, every fourth, the last of every epoch: 0, 2, 3, 5 of 0 to 5.
    assert callback.calls == {"compiled": 2, "uncompiled": 4}


@pytest.mark.integration
def test_a_ramp_runs_uncompiled_and_is_compiled_once_when_it_is_down(tmp_path):
    callback = compiled()
    annealing = ThresholdAnnealing(end=0.5)
    model, _ = train(tmp_path, callback, annealing, epochs=4, one_stage=True)
    plain, _ = train(tmp_path, ThresholdAnnealing(end=0.5), epochs=4, one_stage=True)
    equal(model, plain)
    assert callback.calls == {"compiled": 6, "uncompiled": 6}
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.integration
def test_parts_are_compiled_by_pattern_and_evaluation_if_asked(tmp_path):
    model, _ = train(tmp_path, compiled(modules=["backbone.layer*"]), epochs=1)
    plain, _ = train(tmp_path, epochs=1)
    equal(model, plain)
    assert counters["stats"]["unique_graphs"] == 3
    counters.clear()
    train(tmp_path, compiled(evaluation=True), one_layer=True)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.integration
def test_hooks_at_every_step_are_a_warning(tmp_path):
    class Hooks(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.backbone.layer1.register_forward_hook(lambda *_: None)

    _, messages = train(tmp_path, compiled(), Hooks())
    assert messages == [
        "TorchCompile: nothing ran compiled, the last step because of hooks on backbone.layer1"
    ]
    assert not counters["stats"]["unique_graphs"]


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor_trains_the_same_network(tmp_path):
    model, _ = train(tmp_path, TorchCompile(), epochs=1, one_stage=True)
    assert counters["stats"]["unique_graphs"] == 1
    plain, _ = train(tmp_path, epochs=1, one_stage=True)
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=1e-3, atol=1e-4), name


def test_a_missing_compiler_is_named(tmp_path, monkeypatch):
    from torch._inductor.cpp_builder import cpp_compiler_search

    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_compiler_search.cache_clear()
    try:
        with pytest.raises(ValueError, match="backend: got 'inductor' on the CPU, which needs a C"):
            train(tmp_path, TorchCompile())
        model, _ = train(tmp_path, epochs=1)
        tester = Trainer(accelerator="cpu", logger=False, callbacks=[TorchCompile()])
        (scores,) = tester.validate(model, DataLoader(images()), verbose=False)  # compiles nothing
        assert "val/acc" in scores
    finally:
        cpp_compiler_search.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"mode": "fast"}, "mode: got 'fast', allowed are default, reduce-overhead,"),
        ({"backend": "x"}, "backend: got 'x', allowed are"),
        ({"backend": "aot_eager", "mode": "max-autotune"}, "mode: got 'max-autotune' with backend"),
    ],
)
def test_impossible_arguments(arguments, line):
    with pytest.raises(ValueError, match=line):
        TorchCompile(**arguments)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--trainer.callbacks.modules=[net]"], "modules: got ['net'], allowed are backbone,"),
        (
            ["--trainer.callbacks.mode=reduce-overhead", "--trainer.accumulate_grad_batches=2"],
            "mode: got 'reduce-overhead' with accumulate_grad_batches 2, allowed is 1",
        ),
    ],
)
def test_what_cannot_be_compiled_is_one_line(options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", "digits/n2uq_w2a2", "--wandb", "disabled", "--trainer.max_epochs", "1"]
    assert main([*command, "--trainer.callbacks+=TorchCompile", *options]) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("n2uq: error:")]
    assert len(lines) == 1
    assert line in lines[0]
