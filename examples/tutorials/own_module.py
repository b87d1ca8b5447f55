# %% [markdown]
# # Your own LightningModule
# Any module is quantized by a callback. It needs no base class and no change.

# %%
import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Regressor(L.LightningModule):
    """Predicts the length of a vector of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
        self.example_input_array = torch.zeros(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the predicted lengths `[N]`."""
        return self.net(x).squeeze(1)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the mean squared error."""
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %%
from lightning_n2uq.callbacks import QuantizeModel

L.seed_everything(0, verbose=False)
x = torch.rand(2048, 8)
loader = DataLoader(TensorDataset(x, x.norm(dim=1)), batch_size=64, shuffle=True)
model = Regressor()
trainer = L.Trainer(
    accelerator="cpu",
    max_epochs=5,
    callbacks=[QuantizeModel(policy={"weight_bits": 4, "activation_bits": 4})],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader)

# %% [markdown]
# First and last layer stay in full precision by default; the one between them is quantized.

# %%
print(model.net)
with torch.no_grad():
    print("mean error:", (model.eval()(x) - x.norm(dim=1)).abs().mean().item())
