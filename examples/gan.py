"""A generator and a critic of one's own, with two optimizers and manual optimization, on real digits."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class GAN(LightningModule):
    """Makes images of digits, 8 by 8 pixels.

    Args:
        noise: The numbers that an image is made from.
        width: The channels of both networks.
        lr: The learning rate of both optimizers.
    """

    def __init__(self, noise: int = 16, width: int = 16, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(noise, 4 * width),
            nn.Unflatten(1, (width, 2, 2)),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
        )
        self.critic = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(4 * width, 1),
        )
        self.example_input_array = torch.zeros(2, noise)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Returns images."""
        return self.generator(noise)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Trains the critic, then the generator, on the hinge loss."""
        (real,) = batch
        for_generator, for_critic = self.optimizers()
        made = self(torch.randn(len(real), self.hparams["noise"], device=self.device))

        loss = torch.relu(1 - self.critic(real)).mean() + torch.relu(1 + self.critic(made.detach())).mean()
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        self.log("critic_loss", loss)

        loss = -self.critic(made).mean()
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.log("generator_loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the generator's and the critic's."""
        parts, rate = (self.generator, self.critic), self.hparams["lr"]
        return [torch.optim.Adam(part.parameters(), lr=rate, betas=(0.5, 0.99)) for part in parts]


class Digits(LightningDataModule):
    """The 1,797 digits of scikit-learn, from -1 to 1.

    Args:
        batch_size: Images per step and process.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """Returns all of them."""
        images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
        return DataLoader(TensorDataset(images), self.batch_size, shuffle=True)
