# %% [markdown]
# # Deploy
# Train for a moment, export to ONNX, and run the file with onnxruntime: the predictions are the same.

# %%
from pathlib import Path

from lightning_n2uq.cli import main

fit = ["fit", "--config", "digits/n2uq_w4a4.yaml", "--trainer.max_epochs", "3", "--wandb", "disabled"]
assert main([*fit, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]) == 0
checkpoint = max(Path("runs/digits/n2uq_w4a4").iterdir()) / "best.ckpt"

# %% [markdown]
# `--verify digits` compares codes and predictions on the test images.

# %%
export = ["export", "--ckpt", str(checkpoint), "--format", "onnx", "-o", "model.onnx"]
assert main([*export, "--verify", "digits"]) == 0

# %% [markdown]
# Ten lines of onnxruntime:

# %%
import onnxruntime

from lightning_n2uq.datamodules import DigitsDataModule

data = DigitsDataModule(num_workers=0)
data.setup("test")
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
right = total = 0
for images, labels in data.test_dataloader():
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    right += int((logits.argmax(1) == labels.numpy()).sum())
    total += len(labels)
print(f"{right} of {total} right")

# %% [markdown]
# PyTorch says the same:

# %%
import torch

from lightning_n2uq.modules import QuantizedClassifier

model = QuantizedClassifier.load_from_checkpoint(checkpoint).eval()
with torch.no_grad():
    same = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test_dataloader())
assert same == right, (same, right)
