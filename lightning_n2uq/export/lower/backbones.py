"""How this package's networks and blocks become steps: by the names of their children."""

from __future__ import annotations

from lightning_n2uq.backbones.blocks import BasicBlock, Bottleneck
from lightning_n2uq.backbones.mobilenet_v2 import ConvNormReLU6, InvertedResidual, MobileNetV2
from lightning_n2uq.backbones.resnet import ResNet
from lightning_n2uq.export.lower.builder import Builder, to_float64
from lightning_n2uq.export.lower.deferred import Deferred
from lightning_n2uq.export.lower.grids import add_on_grid, on_a_grid
from lightning_n2uq.export.lower.layers import apply, join, lower
from lightning_n2uq.layers import BiasedPReLU


def _in_order(
    block: object, names: tuple[str, ...], builder: Builder, value: Deferred, path: str
) -> Deferred:
    for name in names:
        value = apply(getattr(block, name), builder, value, join(path, name))
    return value


def _add_and_activate(
    builder: Builder, branch: Deferred, identity: Deferred, act: BiasedPReLU, path: str
) -> Deferred:
    """`act(branch + identity)`; the first bias of `act` goes into the branch, whose norm adds one anyway."""
    total = builder.add(branch.affine(shift=to_float64(act.bias_in)), identity, join(path, "add"))
    return total.prelu(to_float64(act.slope)).affine(shift=to_float64(act.bias_out))


def _sum_on_grid(
    builder: Builder, branch: Deferred, identity: Deferred, block: BasicBlock | Bottleneck, path: str
) -> Deferred:
    """`act_out` of the sum of both branches on the block's grid."""
    assert block.grid is not None
    total = add_on_grid(builder, (branch, identity), block.grid, path)
    return apply(block.act_out, builder, total, join(path, "act_out"))


def _residual(
    block: BasicBlock | Bottleneck, convolutions: int, builder: Builder, value: Deferred, path: str
) -> Deferred:
    names = tuple(f"{kind}{i}" for i in range(1, convolutions + 1) for kind in ("act", "conv", "bn"))
    branch = _in_order(block, names, builder, value, path)
    if block.downsample is not None:
        value = apply(block.downsample, builder, value, join(path, "downsample"))
    if block.grid is not None:
        return _sum_on_grid(builder, branch, value, block, path)
    return _add_and_activate(builder, branch, value, block.act_out, path)


@lower.register
def _(block: BasicBlock, builder: Builder, value: Deferred, name: str) -> Deferred:
    return _residual(block, 2, builder, value, name)


@lower.register
def _(block: Bottleneck, builder: Builder, value: Deferred, name: str) -> Deferred:
    return _residual(block, 3, builder, value, name)


@lower.register
def _(block: InvertedResidual, builder: Builder, value: Deferred, name: str) -> Deferred:
    names = tuple(f"{kind}{i}" for i in (1, 2, 3) for kind in ("act", "conv", "bn"))
    branch = _in_order(block, names, builder, value, name)
    if block.grid is not None:
        if block.residual:
            return add_on_grid(builder, (branch, value), block.grid, name)
        return on_a_grid(builder, branch, block.grid, join(name, "grid"))
    return builder.add(branch, value, join(name, "add")) if block.residual else branch


@lower.register
def _(layers: ConvNormReLU6, builder: Builder, value: Deferred, name: str) -> Deferred:
    return _in_order(layers, tuple(dict(layers.named_children())), builder, value, name)


@lower.register
def _(network: ResNet, builder: Builder, value: Deferred, name: str) -> Deferred:
    builder.integer_maps = network.stem_grid is not None
    names = ("conv1", "bn1", "relu", "stem_grid", "maxpool", *network.stages, "out_grid", "avgpool")
    present = tuple(part for part in names if getattr(network, part) is not None)
    value = _in_order(network, present, builder, value, name)
    return apply(network.fc, builder, builder.flatten(value, join(name, "flatten")), join(name, "fc"))


@lower.register
def _(network: MobileNetV2, builder: Builder, value: Deferred, name: str) -> Deferred:
    builder.integer_maps = network.on_grids
    value = _in_order(network, ("features", "avgpool"), builder, value, name)
    return apply(network.fc, builder, builder.flatten(value, join(name, "flatten")), join(name, "fc"))
