"""`n2uq sensitivity` on configs: files, the policy it writes trains, one line for bad input."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from small_run import SMALL
from users_modules import CONFIG, SOURCE

from lightning_n2uq.cli import main
from lightning_n2uq.cli.sensitivity_files import compact
from lightning_n2uq.convert import Policy, Sensitivity
from lightning_n2uq.modules import QuantizedClassifier

DIGITS = ["--config", "digits/float.yaml", "--model.backbone_args", "{width: 4}"]
QUICK = ["--bits", "2", "4", "--batches", "1"]
UNTRAINED = "ignore:n2uq sensitivity. no --ckpt_path"


@pytest.fixture
def own(in_empty_folder, monkeypatch):
    Path("users_own.py").write_text(SOURCE)
    config = yaml.safe_load(CONFIG)
    del config["trainer"]["callbacks"]
    Path("own.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    yield in_empty_folder
    sys.modules.pop("users_own", None)


def refused(arguments, capsys):
    assert main(arguments) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("n2uq: error:")]
    return line


@pytest.mark.integration
@pytest.mark.filterwarnings(UNTRAINED)
def test_its_policy_trains_a_classifier(in_empty_folder, capsys):
    out = Path("bits")
    command = ["sensitivity", *DIGITS, *QUICK, "-o", str(out)]
    assert main([*command, "--budget", "bitops=0.6*uniform:4"]) == 0
    shown = capsys.readouterr()
    assert "scoring layers" in shown.err
    assert "uniform 4: " in shown.out
    run = f"train by it: n2uq fit {shlex.join(DIGITS)} --config {out / 'mixed_bits.yaml'}\n"
    assert run in shown.out
    assert {path.name for path in out.iterdir()} == {
        "scores.json",
        "policy.yaml",
        "mixed_bits.yaml",
        "scores.png",
    }
    assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
    scores = Sensitivity.from_mapping(json.loads((out / "scores.json").read_text()))
    assert len(scores.layers) == 20
    assert scores.measures == ("kl", "loss")
    policy = Policy.from_mapping(yaml.safe_load((out / "policy.yaml").read_text()))
    assert {rule.weight_bits for rule in policy.rules} == {2, 4}
    assert not Path("runs").exists()

    again = [*command, "--scores", str(out / "scores.json"), "--budget", "bitops=0.6*uniform:4"]
    first = (out / "policy.yaml").read_text()
    assert main(again) == 0
    assert (out / "policy.yaml").read_text() == first

    small = [*SMALL[4:], "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"]
    overlay = ["--config", "digits/float.yaml", "--config", str(out / "mixed_bits.yaml")]
    assert main(["fit", *overlay, *small]) == 0
    (checkpoint,) = Path("runs").rglob("last.ckpt")
    network = QuantizedClassifier.from_checkpoint(str(checkpoint)).backbone
    for rule in policy.rules:
        layer = network.get_submodule(rule.name)
        assert (layer.weight_quantizer.bits, layer.weight_quantizer.name) == (rule.weight_bits, "n2uq")
        assert layer.activation_quantizer.bits == rule.activation_bits


@pytest.mark.integration
def test_a_checkpoints_weights_are_scored(trained, in_empty_folder, capsys):
    best = trained[0] / "last.ckpt"
    assert main(["sensitivity", "--ckpt_path", str(best), *QUICK, "--bits", "2"]) == 0
    scores = Sensitivity.from_mapping(json.loads(Path("sensitivity/scores.json").read_text()))
    assert all(score == 0 for layer in scores.layers for score in layer.kl.values())  # it is a W2A2 network
    assert scores.reference_loss < 2.4
    assert not Path("sensitivity/policy.yaml").exists()


@pytest.mark.integration
@pytest.mark.filterwarnings(UNTRAINED)
def test_its_policy_trains_a_users_own_module(own, capsys):
    assert main(["sensitivity", "--config", "own.yaml", *QUICK, "--budget", "mean_bits=4"]) == 0
    scores = Sensitivity.from_mapping(json.loads(Path("sensitivity/scores.json").read_text()))
    assert scores.measures == ("loss",)  # of a regression
    assert [layer.name for layer in scores.layers] == ["net.2"]
    capsys.readouterr()
    assert main(["fit", "--config", "own.yaml", "--config", "sensitivity/mixed_bits.yaml"]) == 0
    shown = capsys.readouterr()
    assert "1 quantized, 2 excluded" in shown.out + shown.err
    config = yaml.safe_load(CONFIG)
    Path("with.yaml").write_text(yaml.safe_dump(config))
    assert main(["sensitivity", "--config", "with.yaml", *QUICK, "--budget", "mean_bits=4"]) == 0
    assert "in the config's QuantizeModel" in capsys.readouterr().out
    config["trainer"]["callbacks"][1]["init_args"]["policy"] = "sensitivity/policy.yaml"
    Path("with.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "with.yaml"]) == 0


MORE = """

class Keywords(Regressor):  # takes keywords, returns logits among others, as Hugging Face's do
    def __init__(self):
        super().__init__()
        self.example_input_array = None
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return {"loss": None, "logits": self.head(self.net[:4](x))}

    def training_step(self, batch, index):
        self.log("train/loss", 0.0)
        loss = nn.functional.cross_entropy(self(batch["x"])["logits"], batch["y"])
        return {"loss": loss}


class KeywordData(Data):
    def setup(self, stage):
        assert not hasattr(self, "x")  # once
        self.x = torch.randn(32, 4)

    def train_dataloader(self):
        return DataLoader([{"x": x, "y": (x.sum() > 0).long()} for x in self.x], batch_size=16)


class StepOnly(Regressor):
    def __init__(self):
        super().__init__()
        self.example_input_array = None

    forward = LightningModule.forward

    def training_step(self, batch, index):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


class Manual(Regressor):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net[4] = nn.Linear(16, 2)

    def training_step(self, batch, index):
        self.optimizers().zero_grad()


class OnlyInTraining(Manual):
    def training_step(self, batch, index):
        if not self.training:
            raise AttributeError("no losses in evaluation")
        return self(batch[0]).sum()
"""


@pytest.mark.filterwarnings(UNTRAINED)
@pytest.mark.parametrize(
    ("name", "measures"),
    [("Keywords", ("kl", "loss")), ("StepOnly", ("loss",)), ("Manual", ("kl",)), ("OnlyInTraining", ("kl",))],
)
def test_modules_of_many_kinds_are_scored(own, capsys, name, measures):
    Path("users_own.py").write_text(SOURCE + MORE)
    data = ["--data", "users_own.KeywordData" if name == "Keywords" else "users_own.Data"]
    assert main(["sensitivity", "--model", f"users_own.{name}", *data, *QUICK]) == 0
    scores = Sensitivity.from_mapping(json.loads(Path("sensitivity/scores.json").read_text()))
    assert scores.measures == measures
    assert ("loss: none, since training_step cannot be run on its own" in capsys.readouterr().out) == (
        name in ("Manual", "OnlyInTraining")
    )


@pytest.mark.integration
@pytest.mark.filterwarnings(UNTRAINED)
def test_bad_input_is_one_line(in_empty_folder, capsys):
    command = ["sensitivity", *DIGITS]
    assert "config: got none" in refused(["sensitivity"], capsys)
    assert "bits: got '9', allowed are 2 to 8" in refused([*command, "--bits", "9"], capsys)
    assert "batches: got 0, allowed are integers from 1" in refused([*command, "--batches", "0"], capsys)
    assert "ckpt_path" in refused([*command, "--ckpt_path", "none.ckpt"], capsys)
    assert "scores: cannot read 'none.json'" in refused([*command, "--scores", "none.json"], capsys)
    assert "device: got 'tpu'" in refused([*command, "--device", "tpu"], capsys)
    line = refused([*command, "--weight_quantizer", "lsd"], capsys)
    assert "'lsd'" in line
    line = refused([*command, *QUICK, "--budget", "bitops=7"], capsys)
    assert "budget: got 'bitops=7', allowed is 630784 or more" in line
    assert not Path("sensitivity/policy.yaml").exists()


def test_written_policies_are_short_and_equal():
    rules = [{"name": "a", "weight_bits": 2}, {"quantize": False, "name": "b"}]
    policy = Policy.from_mapping({"skip_first": False, "exclude": ["c"], "rules": rules})
    values = compact(policy)
    assert Policy.from_mapping(values) == policy
    assert values["rules"] == rules
    assert "skip_last" not in values


@pytest.mark.integration
@pytest.mark.filterwarnings(UNTRAINED)
def test_a_detector_is_scored_by_its_loss(in_empty_folder, capsys):
    policy = "{weight_bits: 4, activation_bits: 4, modules: [net.roi_heads]}"
    small = [
        "--data.image_size",
        "32",
        "--data.num_train",
        "4",
        "--data.num_val",
        "2",
        "--data.batch_size",
        "2",
    ]
    small += ["--model.network_args", "{min_size: 32, max_size: 32}", "--model.metric", "iou"]
    small += ["--trainer.callbacks", f"[{{class_path: QuantizeModel, init_args: {{policy: {policy}}}}}]"]
    command = ["sensitivity", "--config", "tasks/detection_n2uq_w4a4.yaml", *small, *QUICK]
    assert main([*command, "--budget", "bitops=0.9*uniform:4"]) == 0
    assert "sum of loss" in capsys.readouterr().out
    scores = Sensitivity.from_mapping(json.loads(Path("sensitivity/scores.json").read_text()))
    assert [layer.name for layer in scores.layers] == ["net.roi_heads.box_head.fc7"]
    (layer,) = scores.layers
    assert not layer.kl
    assert {str(width) for width in layer.loss} == {"2", "4"}
