# %% [markdown]
# # Many devices
# `--trainer.strategy nuqsgd` sends gradients of 4 bits. Two processes on one CPU show it; on a cluster
# nothing else changes.

# %%
import subprocess
import sys

command = [sys.executable, "-m", "lightning_n2uq", "fit", "--config", "digits/float.yaml"]
command += ["--trainer.devices", "2", "--trainer.strategy", "nuqsgd", "--trainer.max_epochs", "2"]
command += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
command += ["--wandb", "disabled"]
done = subprocess.run(command, capture_output=True, text=True, check=False)
assert done.returncode == 0, done.stderr
print(done.stdout)

# %% [markdown]
# ## What travels
# A codec turns a gradient into bytes. The decoded gradient is right on average, and its error has a bound.

# %%
import torch

from lightning_n2uq.compression import NUQCodec

gradient = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
codec = NUQCodec(bits=4)
payload = codec.encode(gradient, seed=0)
print(f"{4 * gradient.numel():,} bytes become {payload.numel():,}")

error = (codec.decode(payload, gradient.numel()) - gradient).square().sum() / gradient.square().sum()
print(f"relative squared error {error:.3f}, at most {codec.variance_bound():.3f} on average")

# %%
mean = sum(codec.decode(codec.encode(gradient, seed), gradient.numel()) for seed in range(100)) / 100
print(f"after averaging 100 of them: {((mean - gradient).square().sum() / gradient.square().sum()):.4f}")
