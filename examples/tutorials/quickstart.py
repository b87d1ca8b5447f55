# %% [markdown]
# # Quickstart
# A ResNet-20 with weights and activations of 2 bits learns handwritten digits. Nothing is downloaded.
#
# `main([...])` is the command `n2uq ...` from Python.

# %%
from pathlib import Path

from lightning_n2uq.cli import main

EPOCHS = 3
fit = ["fit", "--config", "digits/n2uq_w2a2.yaml", "--trainer.max_epochs", str(EPOCHS), "--wandb", "disabled"]
quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
assert main([*fit, *quiet, "--test_after_fit", "true"]) == 0

# %% [markdown]
# Everything about the run lies in one folder.

# %%
run = max(Path("runs/digits/n2uq_w2a2").iterdir())
print(sorted(path.name for path in run.iterdir()))

# %% [markdown]
# The checkpoint is an ordinary module. Each quantized layer has learned its thresholds.

# %%
from lightning_n2uq.modules import QuantizedClassifier
from lightning_n2uq.quantizers import LearnableThresholdQuantizer

model = QuantizedClassifier.load_from_checkpoint(run / "best.ckpt").eval()
quantizers = [m for m in model.modules() if isinstance(m, LearnableThresholdQuantizer)]
print(len(quantizers), "quantizers; thresholds of the first:", quantizers[0].thresholds().detach())

# %% [markdown]
# The number of bytes of the network, packed, against float32:

# %%
from lightning_n2uq.summary import weigh

summary = weigh(model)
print(f"{summary.packed_bytes():,} of {summary.float_bytes():,} bytes")
