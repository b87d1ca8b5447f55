"""The configs for own images: each trains one step on a folder of them."""

from pathlib import Path

import pytest
import yaml

import lightning_n2uq.configs
from lightning_n2uq.cli import main
from own_photos import write_photos

FOLDER = Path(lightning_n2uq.configs.__path__[0]) / "images"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
MOST = 128  # pixels: what a laptop's processor trains on within minutes


def test_there_is_one_for_every_way_to_begin():
    assert {"n2uq_w2a2", "n2uq_w4a4", "timm_n2uq_w4a4", "n2uq_w2a2_finetune", "float"} <= set(CONFIGS)


@pytest.mark.integration
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_one_step_on_a_plain_folder(name, in_empty_folder, capsys):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    write_photos(in_empty_folder / "photos", 5)
    command = ["fit", "--config", f"images/{name}.yaml", "--data.root", "photos", "--model.init_from", "null"]
    command += ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    command += [
        "--data.batch_size",
        "4",
        "--data.image_size",
        "32",
        "--trainer.enable_model_summary",
        "false",
    ]
    assert main(command) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_it_says_what_it_is_and_is_sized_for_a_laptop(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# Your own images")
    assert f"--config images/{name}.yaml --data.root photos" in text
    data = yaml.safe_load(text)["data"]["init_args"]
    assert data["image_size"] <= MOST
    assert "root" not in data
    assert name in (Path(__file__).parents[2] / "docs" / "own_images.md").read_text()
