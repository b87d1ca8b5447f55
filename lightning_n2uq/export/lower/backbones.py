"""How this package's networks and blocks become steps: by the names of their children."""

from __future__ import annotations

from lightning_n2uq.backbones.blocks import BasicBlock, Bottleneck
from lightning_n2uq.backbones.mobilenet_v2 import InvertedResidual, MobileNetV2
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.export.lower.builder import Builder, to_float64
from lightning_n2uq.export.lower.deferred import Bend, Lazy
from lightning_n2uq.export.lower.layers import apply, join
from lightning_n2uq.layers import BiasedPReLU


def _chain(block: object, names: tuple[str, ...], builder: Builder, value: Lazy, path: str) -> Lazy:
    for name in names:
        value = apply(getattr(block, name), builder, value, join(path, name))
    return value


def _join_and_bend(builder: Builder, branch: Lazy, identity: Lazy, act: BiasedPReLU, path: str) -> Lazy:
    """`act(branch + identity)`; the first bias of `act` goes into the branch, whose norm adds one anyway."""
    total = builder.add(branch.linear(shift=to_float64(act.bias_in)), identity, join(path, "add"))
    return total.then(Bend(to_float64(act.slope))).linear(shift=to_float64(act.bias_out))


def _residual(
    block: BasicBlock | Bottleneck, convolutions: int, builder: Builder, value: Lazy, path: str
) -> Lazy:
    names = tuple(f"{kind}{i}" for i in range(1, convolutions + 1) for kind in ("act", "conv", "bn"))
    branch = _chain(block, names, builder, value, path)
    if block.downsample is not None:
        value = apply(block.downsample, builder, value, join(path, "downsample"))
    return _join_and_bend(builder, branch, value, block.act_out, path)


@apply.register
def _(block: BasicBlock, builder: Builder, value: Lazy, name: str) -> Lazy:
    return _residual(block, 2, builder, value, name)


@apply.register
def _(block: Bottleneck, builder: Builder, value: Lazy, name: str) -> Lazy:
    return _residual(block, 3, builder, value, name)


@apply.register
def _(block: InvertedResidual, builder: Builder, value: Lazy, name: str) -> Lazy:
    names = tuple(f"{kind}{i}" for i in (1, 2, 3) for kind in ("act", "conv", "bn"))
    branch = _chain(block, names, builder, value, name)
    return builder.add(branch, value, join(name, "add")) if block.residual else branch


@apply.register
def _(network: ResNet, builder: Builder, value: Lazy, name: str) -> Lazy:
    names = ("conv1", "bn1", "relu", "maxpool", *network.stages, "avgpool")
    value = _chain(network, names, builder, value, name)
    return apply(network.fc, builder, builder.flatten(value, join(name, "flatten")), join(name, "fc"))


@apply.register
def _(network: MobileNetV2, builder: Builder, value: Lazy, name: str) -> Lazy:
    value = _chain(network, ("features", "avgpool"), builder, value, name)
    return apply(network.fc, builder, builder.flatten(value, join(name, "flatten")), join(name, "fc"))
