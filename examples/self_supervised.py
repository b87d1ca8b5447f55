"""Self-supervised learning of one's own: a student follows the moving average of itself, on real digits."""

import copy

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Student(LightningModule):
    """Two views of an image get one embedding: the student predicts the teacher's (Grill et al., 2020).

    Args:
        width: The channels of the encoder.
        lr: The learning rate.
        momentum: The share of itself that the teacher keeps in a step.
    """

    def __init__(self, width: int = 16, lr: float = 2e-3, momentum: float = 0.98) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.student = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predictor = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns embeddings."""
        return self.student(images)

    def _distance(self, images: torch.Tensor) -> torch.Tensor:
        """Returns how far the student's prediction of another view is from the teacher's embedding."""
        one, other = (images + 0.3 * torch.randn_like(images) for _ in range(2))
        with torch.no_grad():
            wanted = self.teacher(other)
        return 1 - nn.functional.cosine_similarity(self.predictor(self(one)), wanted).mean()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Returns the loss of a batch."""
        loss = self._distance(batch[0])
        self.log("train_loss", loss)
        return loss

    def on_train_batch_end(self, outputs: object, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Moves the teacher towards the student, quantizers included."""
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.data.lerp_(new.data, 1 - self.hparams["momentum"])

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Logs the loss."""
        self.log("val_loss", self._distance(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam over whatever is trained."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(trained, lr=self.hparams["lr"])


class Digits(LightningDataModule):
    """The 1,797 digits of scikit-learn, without their labels.

    Args:
        batch_size: Images per step and process.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1

    def train_dataloader(self) -> DataLoader:
        """Returns most of them."""
        return DataLoader(TensorDataset(self.images[:1600]), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Returns the rest."""
        return DataLoader(TensorDataset(self.images[1600:]), self.batch_size)
