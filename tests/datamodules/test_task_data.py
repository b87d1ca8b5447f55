"""Data of the tasks beside classification: what a batch holds, and that it follows from the seed."""

import itertools

import pytest
import torch

from lightning_n2uq.datamodules import (
    PythonDocsTextDataModule,
    ShapesDetectionDataModule,
    ShapesSegmentationDataModule,
    SyntheticSequencesDataModule,
)

SMALL = {"image_size": 32, "num_train": 6, "num_val": 4, "num_test": 4, "batch_size": 4}


def first(module, split="train"):
    return next(iter(getattr(module, f"{split}_dataloader")()))


def test_a_box_holds_what_the_class_map_shows():
    images, classes = first(ShapesSegmentationDataModule(**SMALL, max_objects=1), "val")
    (pictures, targets) = first(ShapesDetectionDataModule(**SMALL, max_objects=1), "val")
    assert images.shape == (4, 3, 32, 32)
    assert classes.shape == (4, 32, 32)
    for image, picture, shown, target in zip(images, pictures, classes, targets, strict=True):
        torch.testing.assert_close(image, (picture - 0.5) * 4)
        rows, columns = shown.nonzero(as_tuple=True)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"].tolist() == [[int(edge) for edge in box]]
        assert set(shown.unique().tolist()) == {0, int(target["labels"])}


def test_every_batch_has_objects_of_several_kinds():
    module = ShapesDetectionDataModule(image_size=32, num_train=40, batch_size=40)
    images, targets = first(module)
    assert {len(target["labels"]) for target in targets} == {1, 2, 3}
    assert {int(label) for target in targets for label in target["labels"]} == {1, 2, 3}
    assert module.num_classes == len(module.class_names) == 4
    assert all(image.min() >= 0 and image.max() <= 1 for image in images)


@pytest.mark.parametrize("kind", [ShapesSegmentationDataModule, ShapesDetectionDataModule])
def test_scenes_follow_from_the_seed_and_splits_differ(kind):
    one, again, other = (kind(**SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.stack([*first(one)[0]]), torch.stack([*first(again)[0]]))
    assert not torch.equal(torch.stack([*first(one)[0]]), torch.stack([*first(other)[0]]))
    assert not torch.equal(torch.stack([*first(one, "val")[0]]), torch.stack([*first(one, "test")[0]]))


def test_text_is_readable_and_its_splits_are_consecutive():
    module = PythonDocsTextDataModule(length=64, max_pieces=20, batch_size=16)
    module.setup()
    pieces = torch.cat([module.splits[split].tensors["input_ids"] for split in ("train", "val", "test")])
    assert [len(module.splits[split]) for split in ("train", "val", "test")] == [16, 2, 2]
    text = bytes(pieces.flatten().tolist()).decode()
    assert text.startswith('The "assert" statement')
    batch = first(module)
    assert batch["input_ids"].shape == (16, 64)
    assert batch["input_ids"].dtype == torch.int64


def test_too_few_pieces_for_a_split_are_refused():
    module = PythonDocsTextDataModule(max_pieces=3, batch_size=1)
    with pytest.raises(ValueError, match=r"val_fraction: got \(0.1, 0.1\), allowed leaves pieces"):
        module.setup("fit")
    with pytest.raises(ValueError, match=r"batch_size: got 9, allowed is 1 to 8 \(.* has 8 pieces"):
        PythonDocsTextDataModule(max_pieces=10, batch_size=9).setup("fit")


def test_texts_of_a_class_follow_its_chain():
    module = SyntheticSequencesDataModule(3, 6, 400, sharpness=2.0, num_train=6, num_val=3, batch_size=6)
    module.setup()
    rows = module.splits["train"].tensors
    ids, mask, labels = rows["input_ids"], rows["attention_mask"], rows["labels"]
    assert ((ids == 0) == (mask == 0)).all()
    assert (mask[:, :200] == 1).all()
    assert mask.sum(1).unique().numel() > 1
    counts = torch.zeros(6, 6, 6)
    for row, (tokens, length) in enumerate(zip(ids, mask.sum(1), strict=True)):
        for before, after in itertools.pairwise(tokens[:length]):
            counts[row, before, after] += 1
    shares = (counts / counts.sum(2, keepdim=True).clamp(min=1)).flatten(1)
    apart = torch.cdist(shares, shares)
    same = labels[:, None] == labels[None, :]
    assert apart[same].max() < apart[~same].min()
