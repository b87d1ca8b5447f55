"""Bytes of a step of sharded training, as counted in the collectives of FSDP2 alone and by the state."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

from exchange_jobs.sharded_training import NETWORKS, exchange, mesh_of_replicas, native_mesh, sharded, train

OLD_NAMES = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}


def bytes_of(kind, group, tensors):
    """Bytes that a rank sends in a collective; the smaller tensor is one rank's part."""
    ranks, part = dist.get_world_size(group), min(tensors, key=torch.numel)
    size = part.numel() * part.element_size() * (ranks - 1)
    return 2 * size / ranks if kind == "all_reduce" else size


@contextlib.contextmanager
def counted():
    """Counts the bytes that this rank sends to others in collectives that FSDP2 itself starts."""
    names = {kind: f"{kind}_single" for kind in OLD_NAMES} | {"all_reduce": "all_reduce"}
    if not hasattr(dist, "all_gather_single"):  # before torch 2.14
        names.update(OLD_NAMES)
    found, kept = dict.fromkeys(names, 0.0), {name: getattr(dist, name) for name in names.values()}

    def watch(kind, function):
        def call(*args, group=None, **kwargs):
            tensors = [value for value in (*args, *kwargs.values()) if torch.is_tensor(value)]
            found[kind] += bytes_of(kind, group, tensors)
            return function(*args, group=group, **kwargs)

        return call

    for kind, name in names.items():
        setattr(dist, name, watch(kind, kept[name]))
    try:
        yield found
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def sent(rank):
    """Bytes of one step: of FSDP2 alone by collective, and as the state counts them."""
    found = {}
    replicas = mesh_of_replicas()
    native = native_mesh()
    for name in NETWORKS:
        for way, plain_mesh, where, settings in (
            ("4 bits", None, {}, {}),
            ("4 bits, parameters 8", None, {}, {"param_bits": 8}),
            ("replicas", native, replicas, {}),
            ("replicas, parameters 8", native, replicas, {"param_bits": 8}),
        ):
            plain = sharded(name, mesh=plain_mesh)
            with counted() as counts:
                train(plain, name, steps=1)
            with exchange(**settings) as state:
                train(sharded(name, state, **where), name, steps=2)
                last = state.stats.last
            found[f"{name}, {way}"] = {
                "plain": dict(counts), "sent": last.sent_bytes, "full": last.full_bytes, "step": last.step,
                "seconds": min(last.encode_s, last.decode_s, last.exchange_s),
            }  # fmt: skip
    return found
