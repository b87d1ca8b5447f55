"""A second opinion on the published N2UQ format: its networks in plain functions over such a state dict.

Written from the description of the format and of the arithmetic, in float64, one tensor operation after the
other, with autograd doing the gradients. It shares no code with the package. Entries are drawn when a network
first asks for them, so that one pass over an image fills the state dict.
"""

import torch
import torch.nn.functional as F

RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}
MOBILENET = [(16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1)]
MOBILENET += [(96, 1), (96, 1), (96, 1), (160, 2), (160, 1), (160, 1), (320, 1)]
CONSTANTS = {"two": 2.0, "one": 1.0, "zero": 0.0, "minusone": -1.0, "eps": 1e-3}


class PublishedNetwork:
    """`network(images)` gives logits `[N, classes]`; `network.state` is the float32 state dict."""

    def __init__(self, arch, bits, quantize_downsample=True, classes=7, seed=0):
        self.arch, self.bits, self.quantize_downsample, self.classes = (
            arch,
            bits,
            quantize_downsample,
            classes,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.state, self.used, self.training = {}, {}, False
        self(torch.zeros(1, 3, 32, 32, dtype=torch.float64))

    def __call__(self, images):
        return self.mobilenet(images) if self.arch == "mobilenet_v2" else self.resnet(images)

    def learn(self):
        """Leaf tensors by key, from which the network computes from now on, in training mode."""
        self.training = True
        skip = (*CONSTANTS, "clip_val", "running_mean", "running_var", "num_batches_tracked")
        keys = [k for k in self.used if k.rpartition(".")[2] not in skip or k.endswith("quan1.clip_val")]
        self.used.update({key: self.used[key].requires_grad_() for key in keys})
        return {key: self.used[key] for key in keys}

    def get(self, key, make):
        """The entry in float64, drawn in float32 when it is new."""
        if key not in self.state:
            self.state[key] = make().float()
            self.used[key] = self.state[key].double()
        return self.used[key]

    def normal(self, *shape, scale=1.0):
        return lambda: torch.randn(*shape, generator=self.generator) * scale

    def uniform(self, low, high, *shape):
        return lambda: torch.rand(*shape, generator=self.generator) * (high - low) + low

    def quantizer(self, name, x):
        n = 2**self.bits - 1
        step = 2 / n
        start = self.get(f"{name}.start", self.normal(1, scale=0.1))
        width = self.get(f"{name}.a", self.uniform(0.4 * step, 1.6 * step, n))
        scale_in, scale_out = (self.get(f"{name}.scale{i}", self.uniform(0.5, 1.5, 1)) for i in (1, 2))
        for key, value in CONSTANTS.items():
            self.get(f"{name}.{key}", lambda value=value: torch.tensor([value]))
        floor = self.used[f"{name}.eps"]
        width = torch.where(width > floor, width, floor)
        x, knot, code, line = x * scale_in, start, 0, 0
        for k in range(n):
            code = code + (x > knot + width[k] / 2).double()
            line = torch.where(x > knot, k * step + step / width[k] * (x - knot), line)
            knot = knot + width[k]
        line = torch.where(x > knot, torch.full_like(x, 2.0), line)
        return (line + (code * step - line).detach()) * scale_out

    def pact(self, name, x):
        clip = self.get(f"{name}.clip_val", self.uniform(1.5, 2.5, 1))
        n = 2**self.bits - 1
        clipped = torch.where(torch.relu(x) < clip, torch.relu(x), clip)
        return torch.round(clipped.detach() * (n / clip.detach())) * clip / n + clipped - clipped.detach()

    def conv(self, name, x, outputs, kernel, stride=1, groups=1, quantized=True):
        shape = (outputs, x.shape[1] // groups, kernel, kernel)
        weight = self.get(f"{name}.weight", self.normal(*shape, scale=(2 / (shape[1] * kernel**2)) ** 0.5))
        if quantized:
            self.get(f"{name}.clip_val", lambda: torch.tensor([2.0]))
            self.get(f"{name}.zero", lambda: torch.tensor([0.0]))
            n = 2**self.bits - 1
            size = (weight.abs().mean((1, 2, 3), keepdim=True) * n / 2 ** (self.bits - 1)).detach()
            scaled = weight / size
            levels = size * (torch.round((scaled.clamp(-1, 1) + 1) * n / 2) * 2 / n - 1)
            weight = scaled + (levels - scaled).detach()
        return F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=groups)

    def norm(self, name, x):
        channels = x.shape[1]
        weight = self.get(f"{name}.weight", self.uniform(0.5, 1.5, channels))
        bias = self.get(f"{name}.bias", self.normal(channels, scale=0.2))
        mean = self.get(f"{name}.running_mean", self.normal(channels, scale=0.3))
        variance = self.get(f"{name}.running_var", self.uniform(0.5, 1.5, channels))
        counter = f"{name}.num_batches_tracked"
        if counter not in self.state:
            self.state[counter] = torch.tensor(7)
        return F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training=self.training)

    def activation(self, block, number, x):
        channels = x.shape[1]
        x = x + self.get(f"{block}.bias{number}1.bias", self.normal(1, channels, 1, 1, scale=0.2))
        x = F.prelu(x, self.get(f"{block}.prelu{number}.weight", self.uniform(0, 0.5, channels)))
        return x + self.get(f"{block}.bias{number}2.bias", self.normal(1, channels, 1, 1, scale=0.2))

    def unit(self, block, number, x, outputs, kernel, stride=1, groups=1):
        x = self.quantizer(f"{block}.quan{number}", self.activation(block, number, x))
        x = self.conv(f"{block}.conv{number}", x, outputs, kernel, stride, groups)
        return self.norm(f"{block}.bn{number}", x)

    def linear(self, x):
        weight = self.get("fc.weight", self.normal(self.classes, x.shape[1], scale=x.shape[1] ** -0.5))
        return F.linear(x, weight, self.get("fc.bias", self.normal(self.classes, scale=0.1)))

    def block(self, name, x, planes, stride):
        deep = self.arch == "resnet50"
        outputs = planes * 4 if deep else planes
        if deep:
            y = self.unit(name, 1, x, planes, 1)
            y = self.unit(name, 2, y, planes, 3, stride)
            y = self.unit(name, 3, y, outputs, 1)
        else:
            y = self.unit(name, 1, x, planes, 3, stride)
            y = self.unit(name, 2, y, planes, 3)
        if stride != 1 or x.shape[1] != outputs:
            down, q = f"{name}.downsample", self.quantize_downsample
            x = self.quantizer(f"{down}.0", x) if q else x
            x = self.conv(f"{down}.{int(q)}", x, outputs, 1, stride, quantized=q)
            x = self.norm(f"{down}.{int(q) + 1}", x)
        return self.activation(name, 0 if deep else 3, y + x)

    def resnet(self, x):
        x = torch.relu(self.norm("bn1", self.conv("conv1", x, 64, 7, 2, quantized=False)))
        x = F.max_pool2d(x, 3, 2, 1)
        for i, count in enumerate(RESNETS[self.arch]):
            for j in range(count):
                x = self.block(f"layer{i + 1}.{j}", x, 64 * 2**i, 2 if i > 0 and j == 0 else 1)
        return self.linear(x.mean((2, 3)))

    def mobilenet(self, x):
        x = self.norm("feature.0.bn1", self.conv("feature.0.conv1", x, 32, 3, 2, quantized=False)).clamp(0, 6)
        for i, (outputs, stride) in enumerate(MOBILENET, start=1):
            hidden = x.shape[1] * (1 if i == 1 else 6)
            y = self.unit(f"feature.{i}", 1, x, hidden, 1)
            y = self.unit(f"feature.{i}", 2, y, hidden, 3, stride, hidden)
            y = self.unit(f"feature.{i}", 3, y, outputs, 1)
            x = y + x if stride == 1 and x.shape[1] == outputs else y
        x = self.conv("feature.18.conv1", self.pact("feature.18.quan1", x), 1280, 1)
        return self.linear(self.norm("feature.18.bn1", x).clamp(0, 6).mean((2, 3)))
