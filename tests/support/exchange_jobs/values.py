"""The exchange beside plain DDP on the same data: what every mode gives, in numbers."""

from __future__ import annotations

import torch
import torch.distributed as dist

from exchange_jobs.training import TINY_BUCKETS, Training, exchange
from lightning_n2uq.compression import IdentityCodec

ALL = 4
IDENTITY = {"codec": IdentityCodec()}
ALL_GATHER = {"scheme": "all_gather"}
NODES = {"hierarchical": True, "ranks_per_node": 2}
TAILS = {"bucket_size": 64, "unit_numel": 300}
EIGHT_BITS = {"bits": 8, "levels": "float"}
ROTATED = {"rotation": "hadamard", "bucket_size": 256}
EDEN = ROTATED | {"bits": 2, "rounding": "eden"}
TINY = Training(ddp=(("bucket_cap_mb", TINY_BUCKETS),))
FOUR = Training(ranks=ALL)
ODD_FOUR = Training("odd", ranks=ALL, ddp=(("bucket_cap_mb", TINY_BUCKETS),))

EXACT = {
    "two phases": (Training(), IDENTITY),
    "all-gather": (Training(), IDENTITY | ALL_GATHER),
    "second-phase bits": (Training(), IDENTITY | {"second_phase_bits": 8}),
    "several buckets": (TINY, IDENTITY),
    "several buckets, all-gather": (TINY, IDENTITY | ALL_GATHER),
    "uneven sizes": (Training("odd"), IDENTITY | TAILS),
    "uneven sizes, all-gather": (Training("odd"), IDENTITY | TAILS | ALL_GATHER),
    "static graph": (Training("twice", ddp=(("static_graph", True),)), IDENTITY),
    "unused parameters": (Training("branches", ddp=(("find_unused_parameters", True),)), IDENTITY | TAILS),
    "bucket views": (Training(ddp=(("gradient_as_bucket_view", True),)), IDENTITY),
    "frozen parameters": (Training("frozen"), IDENTITY),
    "accumulation": (Training(accumulate=3), IDENTITY),
    "accumulation, all-gather": (Training(accumulate=3), IDENTITY | ALL_GATHER),
    "bfloat16": (Training(dtype=torch.bfloat16), IDENTITY),
    "float16": (Training(dtype=torch.float16), IDENTITY),
    "float16, all-gather": (Training(dtype=torch.float16), IDENTITY | ALL_GATHER),
    "mixed precision": (Training(autocast=True), IDENTITY),
    "compiled": (Training(compiled=True), IDENTITY),
    "warm-up": (Training(), {"bits": 2, "warmup_steps": 3}),
    "only exempt parameters": (Training(), {"bits": 2, "min_numel": 1 << 20}),
    "four ranks": (FOUR, IDENTITY),
    "four ranks, all-gather": (FOUR, IDENTITY | ALL_GATHER),
    "four ranks, uneven sizes": (ODD_FOUR, IDENTITY | TAILS),
    "two nodes": (FOUR, IDENTITY | NODES),
    "two nodes, all-gather": (FOUR, IDENTITY | NODES | ALL_GATHER),
    "two nodes, second-phase bits": (FOUR, IDENTITY | NODES | {"second_phase_bits": 8}),
    "two nodes, uneven sizes": (ODD_FOUR, IDENTITY | NODES | TAILS),
    "two nodes, some ranks without a chunk": (ODD_FOUR, IDENTITY | NODES | {"bucket_size": 1024}),
    "two nodes, all-gather, some ranks without a chunk": (
        ODD_FOUR,
        IDENTITY | NODES | ALL_GATHER | {"bucket_size": 1024},
    ),
    "two nodes, float16": (Training(ranks=ALL, dtype=torch.float16), IDENTITY | NODES),
    "two nodes, bfloat16": (Training(ranks=ALL, dtype=torch.bfloat16), IDENTITY | NODES),
    "two nodes, accumulation": (Training(ranks=ALL, accumulate=2), IDENTITY | NODES),
    "two nodes, warm-up": (FOUR, NODES | {"bits": 2, "warmup_steps": 3}),
    "one node": (FOUR, IDENTITY | {"hierarchical": True, "ranks_per_node": ALL}),
    "nodes of one rank": (FOUR, IDENTITY | {"hierarchical": True, "ranks_per_node": 1}),
}
"""Modes without loss: training, and settings of the exchange."""

LOSSY = {
    "8 bits": (Training(), EIGHT_BITS, 0.05),
    "8 bits, all-gather": (FOUR, EIGHT_BITS | ALL_GATHER, 0.05),
    "8 bits, two nodes": (FOUR, EIGHT_BITS | NODES, 0.05),
    "8 bits, Huffman": (FOUR, EIGHT_BITS | {"coding": "huffman"}, 0.05),
    "8 bits, error feedback": (FOUR, EIGHT_BITS | {"error_feedback": True}, 0.05),
    "8 bits, compiled": (Training(compiled=True), EIGHT_BITS, 0.05),
    "8 bits, float16": (Training(ranks=ALL, dtype=torch.float16), EIGHT_BITS, 0.05),
    "8 bits, bfloat16": (Training(ranks=ALL, dtype=torch.bfloat16), EIGHT_BITS, 0.05),
    "8 bits, static graph": (Training("twice", ddp=(("static_graph", True),)), EIGHT_BITS, 0.05),
    "8 bits, unused parameters": (
        Training("branches", ddp=(("find_unused_parameters", True),)),
        EIGHT_BITS,
        0.05,
    ),
    "8 bits, bucket views": (Training(ddp=(("gradient_as_bucket_view", True),)), EIGHT_BITS, 0.05),
    "8 bits, uneven sizes": (ODD_FOUR, EIGHT_BITS | TAILS, 0.05),
    "4 bits": (FOUR, {}, 0.5),
    "ALQ": (FOUR, {"method": "alq", "adapt_every": 2}, 0.6),
    "AMQ, all-gather": (FOUR, {"method": "amq", "adapt_every": 2} | ALL_GATHER, 0.5),
    "TernGrad": (FOUR, {"method": "terngrad", "bucket_size": 64}, 2.5),
    "natural compression": (FOUR, {"method": "natural"}, 0.5),
    "signSGD": (FOUR, {"method": "signsgd", "error_feedback": True}, 1.0),
    "top-k, two nodes": (FOUR, {"method": "topk", "error_feedback": True, "density": 0.1} | NODES, 1.0),
    "rotated": (FOUR, ROTATED, 0.3),
    "rotated, all-gather": (FOUR, ROTATED | ALL_GATHER, 0.2),
    "rotated, two nodes, uneven sizes": (ODD_FOUR, ROTATED | NODES | TAILS, 0.2),
    "rotated, 2 bits": (FOUR, EDEN, 0.8),
    "rotated, 2 bits, error feedback": (FOUR, EDEN | {"error_feedback": True}, 0.8),
    "4 bits, then 8": (FOUR, {"levels": "float", "second_phase_bits": 8}, 0.35),
}
"""Modes with loss: training, settings, and the largest error of the first mean gradient, relative to it."""

LATER = {
    "several buckets, all-gather",
    "uneven sizes, all-gather",
    "bucket views",
    "frozen parameters",
    "accumulation, all-gather",
    "float16, all-gather",
    "mixed precision",
    "only exempt parameters",
    "four ranks, all-gather",
    "two nodes, all-gather",
    "two nodes, second-phase bits",
    "two nodes, all-gather, some ranks without a chunk",
    "two nodes, bfloat16",
    "two nodes, accumulation",
    "two nodes, warm-up",
    "one node",
    "nodes of one rank",
    "8 bits, all-gather",
    "8 bits, error feedback",
    "8 bits, compiled",
    "8 bits, float16",
    "8 bits, bfloat16",
    "8 bits, static graph",
    "8 bits, unused parameters",
    "8 bits, bucket views",
    "8 bits, uneven sizes",
    "AMQ, all-gather",
    "natural compression",
    "signSGD",
    "rotated, all-gather",
    "rotated, two nodes, uneven sizes",
    "rotated, 2 bits",
    "4 bits, then 8",
}
"""Modes that combine what others show apart: they run in a job of their own, with the integration tests."""


def values(rank):
    """The modes that combine little, see `_values`."""
    return _values(rank, (EXACT | LOSSY).keys() - LATER)


def later_values(rank):
    """The modes of `LATER`, see `_values`."""
    return _values(rank, LATER)


def _values(rank, names):
    """The modes' numbers beside those of plain DDP, which modes with the same training share.

    Modes of two ranks run on two pairs of ranks at a time. They come last: from there on the pairs create
    process groups independently of each other.
    """
    groups = [dist.new_group(members) for members in ([0, 1], [2, 3])]
    pair = rank // 2
    modes = {name: mode for name, mode in (EXACT | LOSSY).items() if name in names}
    trainings = list(dict.fromkeys(training for training, *_ in modes.values()))
    found = _run(modes, [training for training in trainings if training.ranks == ALL], None)
    dist.barrier()
    of_pairs = [training for training in trainings if training.ranks != ALL]
    # One pair has what takes longest, the first run of a compiled network, the other most of the rest.
    compiled = [training for training in of_pairs if training.compiled]
    others = [training for training in of_pairs if not training.compiled]
    share = others[: len(others) // 3] + compiled if pair == 0 else others[len(others) // 3 :]
    return found | _run(modes, share, groups[pair])


def _run(modes, trainings, group):
    found = {}
    for wanted in trainings:
        reference = wanted.run(group=group)
        for name, (training, settings, *_) in modes.items():
            if training == wanted:
                with exchange(process_group=group, **settings) as state:
                    ours = training.run(state, group)
                    found[name] = {"exchange": ours, "ddp": reference, "steps": state.step}
    return found
