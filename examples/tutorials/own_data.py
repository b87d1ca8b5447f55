# %% [markdown]
# # Your own images
# A folder per class is all that is needed. This page writes one, from scikit-learn's digits.

# %%
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

NAMES = ["zero", "one", "two"]
digits = load_digits(n_class=len(NAMES))
for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
    folder = Path("images", "val" if i % 5 == 0 else "train", NAMES[label])
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{i}.png")
print({path.name: len(list(path.iterdir())) for path in sorted(Path("images/train").iterdir())})

# %% [markdown]
# A config of one's own: any packaged network, on this folder. The number of classes comes from the data.

# %%
Path("own.yaml").write_text("""
trainer: {accelerator: cpu, max_epochs: 2, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: QuantizedClassifier
  init_args: {backbone: resnet20, backbone_args: {width: 8}, weight_bits: 2, activation_bits: 2, lr: 5.0e-3}
data:
  class_path: ImageFolderDataModule
  init_args: {root: images, image_size: 8, in_channels: 1, batch_size: 32, num_workers: 0, min_scale: 0.7}
""")

# %%
from lightning_n2uq.cli import main

assert main(["fit", "--config", "own.yaml", "--wandb", "disabled"]) == 0

# %% [markdown]
# The run keeps the names of the classes, which stand beside their numbers wherever these are shown.

# %%
import json

run = max(Path("runs/own").iterdir())
print(json.loads((run / "run.json").read_text())["class_names"])
