"""Order, sharding and resumption, through a real trainer."""

from itertools import chain

import pytest
import torch
from checksum_training import QUIET, Linear, digits, fit
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_n2uq.datamodules import SyntheticDataModule
from lightning_n2uq.datamodules._data.counter_rng import random_integers
from lightning_n2uq.datamodules._data.sampler import SampleIdSampler


@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # both runs write there, as a resumed run does
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.integration)])
@pytest.mark.parametrize(
    "saving",
    [
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        {"every_n_train_steps": 11},  # 8 steps per epoch: in the middle of the second
    ],
    ids=["epoch_end", "after_validation", "mid_epoch"],
)
def test_resumed_run_sees_the_same_batches_and_ends_with_the_same_weights(tmp_path, saving, workers):
    keep, again = (ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **saving) for _ in range(2))
    whole = fit(digits(num_workers=workers), epochs=3, callbacks=[keep])
    step = 11 if "every_n_train_steps" in saving else 16
    middle = tmp_path / f"step={step}.ckpt"

    resumed = fit(digits(num_workers=workers), epochs=3, ckpt_path=middle, callbacks=[again])

    assert resumed.seen == whole.seen[step:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


def test_workers_change_nothing():
    assert fit(digits(), epochs=2).seen == fit(digits(num_workers=2), epochs=2).seen


def test_epochs_differ_in_order_and_augmentation_and_repeat_with_the_seed():
    first, again, other = (fit(digits(seed=seed), epochs=2).seen for seed in (3, 3, 4))

    assert first == again
    assert first != other
    assert [row[2:] for row in first[:8]] != [row[2:] for row in first[8:]]


def test_global_random_state_is_neither_used_nor_changed():
    data = digits()
    data.setup("fit")
    sums = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        sums.append([images.sum() for images, _ in data.train_dataloader()])
        assert torch.equal(torch.get_rng_state(), before)

    assert sums[0] == sums[1]


def indices(size, **arguments):
    ranks = arguments["num_replicas"]
    return [list(SampleIdSampler(size, rank=rank, **arguments)) for rank in range(ranks)]


def test_training_shards_are_equal_and_cover_everything():
    shards = indices(101, num_replicas=4, batch_size=8, shuffle=True, seed=5)

    assert {len(shard) for shard in shards} == {26}
    assert set().union(*shards) == set(range(101))


def test_evaluation_shards_give_every_image_once():
    shards = indices(101, num_replicas=4, batch_size=8, pad=False)

    assert sorted(chain(*shards)) == list(range(101))


@pytest.mark.parametrize(("size", "batch"), [(17, 8), (3, 8)])
def test_evaluation_shards_pad_where_ranks_would_differ_in_batches(size, batch):
    ranks = 2 if size == 17 else 4
    shards = indices(size, num_replicas=ranks, batch_size=batch, pad=False)

    assert len({-(-len(shard) // batch) for shard in shards}) == 1
    assert set().union(*shards) == set(range(size))


def test_sample_ids_name_epoch_and_image():
    sampler = SampleIdSampler(10, batch_size=5, shuffle=True, seed=1)
    sampler.set_epoch(3)

    sample_ids = list(sampler)

    assert sorted(sample_ids) == list(range(30, 40))
    assert [sample_id - 30 for sample_id in sample_ids] == sampler.order()


def test_every_epoch_and_seed_has_its_own_order():
    orders = set()
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        sampler = SampleIdSampler(100, batch_size=5, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        assert sorted(sampler.order()) == list(range(100))
        orders.add(tuple(sampler.order()))

    assert len(orders | {tuple(range(100))}) == 4


def test_orders_and_augmentation_are_those_of_older_checkpoints():
    sampler = SampleIdSampler(12, batch_size=4, shuffle=True, seed=7)
    sampler.set_epoch(2)
    assert list(sampler) == [29, 25, 28, 34, 26, 35, 27, 24, 33, 31, 32, 30]
    assert random_integers(7, [0, 5, 10**6], (9, 9, 2)).tolist() == [[7, 4, 1], [5, 8, 1], [6, 5, 0]]


def test_without_shuffling_sample_ids_are_indices_in_every_epoch():
    sampler = SampleIdSampler(10, batch_size=5)
    sampler.set_epoch(3)

    assert list(sampler) == list(range(10))


def test_prediction_keeps_order_and_count():
    data = SyntheticDataModule(num_test=21, batch_size=8, in_channels=1, image_size=8)
    predicted = Trainer(**QUIET, enable_checkpointing=False).predict(Linear(), datamodule=data)

    assert torch.equal(torch.cat(predicted), data.splits["test"].labels)
