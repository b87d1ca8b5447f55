"""Recipes for data that a test does not have: each trains one step on made-up images of the right kind."""

import re
from pathlib import Path

import pytest
import yaml

import lightning_n2uq.configs
from lightning_n2uq.cli import main

FOLDER = Path(lightning_n2uq.configs.__path__[0])
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
RECIPES = {
    path.relative_to(FOLDER).with_suffix("").as_posix(): path
    for folder in CLASSES
    for path in sorted((FOLDER / folder).glob("*.yaml"))
}
TRANSFORMERS = {name for name in RECIPES if name.startswith(("imagenet/deit_tiny", "imagenet/swin_tiny"))}
METHODS = ("n2uq", "n2uq_fixed", "lsq", "lsq_plus", "pact", "dorefa", "apot")
QUICK = (
    "cifar10/float",
    "cifar10/lsq_w4a4",
    "cifar10/n2uq_w2a2",
    "cifar10/pact_w3a3",
    "cifar100/apot_w2a2",
    "imagenet/n2uq_mobilenet_v2_w4a4",
    "imagenet/n2uq_resnet18_w2a2",
)


def arguments(name):
    return yaml.safe_load(RECIPES[name].read_text())["model"]["init_args"]


@pytest.mark.integration
@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(n, marks=pytest.mark.slow) for n in RECIPES if n not in {*QUICK, *TRANSFORMERS}),
    ],
)
def test_every_recipe_trains_one_step_on_made_up_images(name, in_empty_folder, capsys):
    command = ["fit", "--config", name, "--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu"]
    # In place of the data, the teacher and the starting point, which are somewhere else.
    command += ["--data", "SyntheticDataModule", "--data.num_classes", str(CLASSES[name.split("/")[0]])]
    command += ["--data.batch_size", "4", "--model.init_from", "null", "--model.teacher", "null"]
    assert main(command) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_every_transformer_trains_one_step_from_random_weights(name, in_empty_folder, capsys):
    config = yaml.safe_load(RECIPES[name].read_text())
    config["model"]["init_args"]["backbone_args"].pop("pretrained", None)  # would be downloaded
    sizes = {"num_classes": 1000, "image_size": 224, "batch_size": 2, "num_train": 4, "num_val": 4}
    config["data"] = {"class_path": "SyntheticDataModule", "init_args": sizes}
    config["model"]["init_args"] |= {"init_from": None, "teacher": None}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    command = [
        "fit",
        "--config",
        "config.yaml",
        "--trainer.fast_dev_run",
        "1",
        "--trainer.accelerator",
        "cpu",
    ]
    assert main(command) == 0, capsys.readouterr().err


def test_transformers_have_recipes_with_their_attention_at_the_same_bits():
    nets = ("deit_tiny", "swin_tiny")
    assert {f"imagenet/{net}_w{bits}a{bits}" for net in nets for bits in (2, 4)} == TRANSFORMERS
    for name in TRANSFORMERS:
        values = arguments(name)
        net, bits = re.fullmatch(r"imagenet/(\w+)_w(\d)a\d", name).groups()
        assert net in values["backbone"]
        asked = values["backbone_args"]["policy"]["attention_bits"]
        assert values["weight_bits"] == values["activation_bits"] == asked == int(bits)
        before = f"runs/imagenet/{net}_w4a4/best.ckpt"
        assert values.get("init_from") == (before if bits == "2" else None)
        assert values["backbone_args"].get("pretrained", False) == (bits == "4")


@pytest.mark.parametrize("folder", ["cifar10", "cifar100"])
def test_every_method_has_a_recipe_and_starts_from_one_bit_more(folder):
    wanted = {f"{folder}/{method}_w{bits}a{bits}" for method in METHODS for bits in (2, 3, 4)}
    others = {f"{folder}/float"} | ({"cifar10/n2uq_w2a2_integer"} if folder == "cifar10" else set())
    assert {name for name in RECIPES if name.startswith(f"{folder}/")} == wanted | others
    for name in wanted:
        method, bits = re.fullmatch(r"\w+/(\w+)_w(\d)a\d", name).groups()
        values = arguments(name)
        assert values["activation_quantizer"] == method
        assert values["weight_bits"] == values["activation_bits"] == int(bits)
        before = f"{folder}/float" if bits == "4" else f"{folder}/{method}_w{int(bits) + 1}a{int(bits) + 1}"
        assert values["init_from"] == f"runs/{before}/best.ckpt"
        checkpoint = yaml.safe_load(RECIPES[before].read_text())["checkpoint"]
        assert f"{checkpoint['dirpath']}/best.ckpt" == values["init_from"]


def test_every_row_of_the_papers_table_has_a_recipe():
    rows = {
        f"imagenet/n2uq_{net}_w{bits}a{bits}{suffix}"
        for net in ("resnet18", "resnet34", "resnet50")
        for bits in (2, 3, 4)
        for suffix in ("", "_float_downsample")
    }
    rows.add("imagenet/n2uq_mobilenet_v2_w4a4")
    assert {name for name in RECIPES if name.startswith("imagenet/")} == rows | TRANSFORMERS
    for name in rows:
        values = arguments(name)
        assert values["backbone"] in name
        assert f"_w{values['weight_bits']}a{values['activation_bits']}" in name
        assert values["quantize_downsample"] == ("float_downsample" not in name)
        assert values["init_from"] == f"torchvision/{values['backbone']}"
        assert values["teacher"] == "torchvision/resnet101"


def test_recipes_follow_the_house_form():
    for name, path in RECIPES.items():
        text = path.read_text()
        assert text.startswith("# "), name
        assert f"--config {name}.yaml" in text, name
        assert set(yaml.safe_load(text)) - {"checkpoint"} == {
            "seed_everything",
            "trainer",
            "model",
            "data",
        }, name
