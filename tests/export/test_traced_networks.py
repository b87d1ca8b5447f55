"""Networks wrapped, preprocessed and reshaped in the ways that users write."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import v2

from lightning_n2uq.convert import quantize_model
from lightning_n2uq.export import ExactNetwork, describe, run_numpy


class Net(nn.Module):
    """A small network whose head is the test's."""

    def __init__(self, head=None, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.last = nn.Linear(8, classes)
        self.head = head or (lambda x: torch.flatten(x, 1))
        self.register_buffer("centre", torch.linspace(-1, 1, 8).view(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.body(self.stem(x))) - self.centre
        return self.last(self.head(self.pool(x)))


class Normalize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]))
        self.register_buffer("std", torch.tensor([0.2, 0.25, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(1, 3, 1, 1)) / self.std.view(1, -1, 1, 1)


class Shifted(nn.Module):
    """Operators with numbers on either side."""

    def forward(self, x: Tensor) -> Tensor:
        return 1 - torch.sub(-x / 2, x * 3, alpha=2)


HEADS = {
    "view of size": lambda x: x.view(x.size(0), -1),
    "view of shape": lambda x: x.view(x.shape[0], 8),
    "reshape": lambda x: x.reshape(x.size()[0], -1),
    "reshape by -1": lambda x: torch.reshape(x, (-1, 8)),
    "squeeze": lambda x: x.squeeze(),
    "squeeze twice": lambda x: x.squeeze(-1).squeeze(-1),
    "squeeze 3, 2": lambda x: torch.squeeze(torch.squeeze(x, 3), 2),
    "squeeze both": lambda x: x.squeeze((2, 3)),
    "index": lambda x: x[:, :, 0, 0],
}
FRONTS = {
    "own normalization": Normalize(),
    "torchvision": transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
    "torchvision v2": v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
    "operators": Shifted(),
}


def check(model, quantizers=1):
    """The traced network gives the module's logits, and every engine the same bits."""
    torch.manual_seed(0)
    x = torch.rand(3, 3, 16, 16)
    quantize_model(model.eval(), {"weight_bits": 4, "activation_bits": 4}, [x])
    model.eval()
    description = describe(model, (3, 16, 16))
    logits = ExactNetwork(description)(x)
    np.testing.assert_array_equal(run_numpy(description, x.numpy())[description.output], logits.numpy())
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x), rtol=1e-3, atol=1e-3)
    assert len(description.quantizers()) == quantizers


@pytest.mark.parametrize("head", HEADS)
def test_ways_to_flatten(head):
    check(Net(HEADS[head]))


@pytest.mark.parametrize("front", FRONTS)
def test_preprocessing_in_front(front):
    check(nn.Sequential(FRONTS[front], Net()))


def test_layers_behind_a_network():
    check(nn.Sequential(Net(), nn.ReLU(), nn.Linear(5, 4)), quantizers=2)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (lambda x: x.view(-1, 4), r"view: the shape \[-1, 4\] has no deployed form"),
        (lambda x: x.squeeze(1), r"squeeze\(1\) has no deployed form"),
        (lambda x: x[:, 0], "has no deployed form"),
        (lambda x: torch.flatten(x, 1) / x.squeeze(), "division by a value"),
        (lambda x: torch.flatten(x, 1) + torch.ones(2, 8), r"constants of shape \(2, 8\)"),
        (lambda x: torch.flatten(x, 1) / torch.zeros(8), "reciprocals of constants are not finite"),
    ],
)
def test_what_has_no_deployed_form_is_named(head, message):
    with pytest.raises(ValueError, match=message):
        describe(Net(head).eval(), (3, 16, 16))
