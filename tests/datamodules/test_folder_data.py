"""Image folders and ImageNet's layouts, on made and on real files."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from lightning_n2uq.datamodules import DataNotFoundError, ImageFolderDataModule, ImageNetDataModule
from lightning_n2uq.datamodules._data.decode import BrokenImageError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenet-sample.zip"
WNIDS = [f"n{number:08}" for number in range(1000)]


def write(path, level=0, size=(40, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode == "L" else (level, level, level)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; an image's grey level tells its class; some files are greyscale."""
    for split, count in (("train", 6), ("val", 5)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                mode = "L" if number % 2 else "RGB"
                write(tmp_path / split / name / f"{number}.png", 100 + 100 * label, mode=mode)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    return tmp_path


def module(root, **changes):
    return ImageFolderDataModule(
        str(root), **{"image_size": 16, "batch_size": 4, "num_workers": 0, **changes}
    )


def loaded(data):
    data.setup()
    return data


def batches(loader):
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_shapes_labels_and_splits(folder, channels):
    data = loaded(module(folder, in_channels=channels))

    assert (data.num_classes, data.in_channels, data.image_size) == (2, channels, 16)
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 12, "val": 10, "test": 10}
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = batches(loader)
        assert images.shape[1:] == (channels, 16, 16)
        assert torch.equal(images[:, 0, 8, 8] > 0.5, labels == 1)


def test_a_zip_reads_like_its_folder_also_in_workers(folder):
    path = folder / "all.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in [*folder.rglob("*.png")]:
            archive.write(file, f"wrapped/{file.relative_to(folder).as_posix()}")
    plain, packed = loaded(module(folder)), loaded(module(path, num_workers=2))

    for split in ("train", "val"):
        one, two = (batches(getattr(data, f"{split}_dataloader")()) for data in (plain, packed))
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])


def test_augmentation_follows_from_seed_epoch_and_image(tmp_path):
    noise = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8).numpy()
    for number in range(4):
        write(tmp_path / "val" / "x" / f"{number}.png")
        write(tmp_path / "train" / "x" / f"{number}.png")
        Image.fromarray(noise).save(tmp_path / "train" / "x" / f"{number}.png")
    data = module(tmp_path)
    data.splits["train"] = data.load_split("train")
    part = data.splits["train"]
    state = torch.get_rng_state()

    images, _ = part.__getitems__([0, 1, 2, 3, 4])

    assert torch.equal(part.__getitems__([3])[0][0], images[3])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[4])  # the same file an epoch later
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_keeps_the_centre(tmp_path):
    path = tmp_path / "val" / "x" / "a.png"
    write(path, 0, size=(64, 64))
    image = Image.new("L", (64, 64))
    image.paste(255, (16, 16, 48, 48))
    image.save(path)

    pixels = module(tmp_path, image_size=56).load_split("val")[0][0][0]  # 64 resized to 64, cropped to 56

    assert (pixels > 0).nonzero().min(0).values.tolist() == [12, 12]
    assert (pixels > 0).nonzero().max(0).values.tolist() == [43, 43]


class Counter(LightningModule):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.counts = []

    def training_step(self, batch, batch_idx):
        self.counts.append(len(batch[1]))
        return self.scale * batch[0].mean()

    def test_step(self, batch, batch_idx):
        self.counts.append(len(batch[1]))

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer():
    return Trainer(
        limit_val_batches=0,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def damaged(folder):
    for name in ("train/bee/2.png", "val/ant/1.png", "val/bee/4.png"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    return folder


def test_a_broken_file_is_named_and_fatal(damaged):
    with pytest.raises(BrokenImageError, match=r"train/bee/2\.png"):
        batches(loaded(module(damaged)).train_dataloader())


@pytest.mark.filterwarnings("ignore:.*many workers")
def test_broken_files_are_replaced_in_training_and_counted(damaged):
    model = Counter()
    with pytest.warns(
        UserWarning, match=r"^on_broken=skip: 1 broken image files in the train split: .*train/bee/2"
    ):
        trainer().fit(model, datamodule=module(damaged, on_broken="skip"))
    assert model.counts == [4, 4, 4]


def test_broken_files_are_left_out_of_the_test_and_counted_across_workers(damaged):
    model = Counter()
    with pytest.warns(UserWarning, match=r"^on_broken=skip: 2 broken .* test split: .*val/ant/1.*val/bee/4"):
        trainer().test(model, datamodule=module(damaged, on_broken="skip", num_workers=2))
    assert sum(model.counts) == 8


def test_a_batch_without_any_readable_file_is_refused(tmp_path):
    (tmp_path / "val" / "x").mkdir(parents=True)
    (tmp_path / "val" / "x" / "a.png").write_bytes(b"")
    data = module(tmp_path, on_broken="skip")
    data.setup("validate")

    with pytest.raises(BrokenImageError, match="no readable image in a batch of 1"):
        batches(data.val_dataloader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_broken": "ignore"}, "on_broken: got 'ignore', allowed are error, skip"),
        ({"in_channels": 2}, "in_channels: got 2, allowed are 1"),
        ({"num_classes": 3}, "num_classes: got 3, allowed is 2"),
        ({"min_scale": 0.0}, "min_scale: got 0.0"),
        ({"image_size": 0}, "image_size: got 0"),
    ],
)
def test_impossible_arguments_are_named(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        module(folder, **arguments)


def test_missing_folders_are_one_line(folder):
    with pytest.raises(
        DataNotFoundError, match=r"^root: got '.*/gone', which does not exist; expected a folder"
    ):
        module(folder / "gone")
    with pytest.raises(DataNotFoundError, match=r"^root: got '.*/ant', which holds no class folders"):
        module(folder / "train" / "ant")
    write(folder / "val" / "wasp" / "0.png")
    with pytest.raises(ValueError, match="val/ has the unknown class 'wasp'"):
        module(folder).setup("fit")


def test_a_batch_larger_than_the_training_split_is_all_of_it(folder):
    data = module(folder, batch_size=13)
    with pytest.warns(
        UserWarning, match="batch_size: got 13, the training split has 12 images: a batch has 12"
    ):
        data.setup("fit")
    assert [len(labels) for _, labels in data.train_dataloader()] == [12]


def index_file(path, wnids=WNIDS):
    path.write_text(json.dumps({str(number): [wnid, "name"] for number, wnid in enumerate(wnids)}))
    return path


def imagenet(root, **changes):
    return ImageNetDataModule(str(root), **{"image_size": 16, "batch_size": 2, "num_workers": 0, **changes})


def test_imagenet_numbers_partial_folders_by_the_index_file(tmp_path):
    for wnid in (WNIDS[7], WNIDS[900]):
        write(tmp_path / "train" / wnid / "a.JPEG")
        write(tmp_path / "val" / wnid / "b.JPEG")
    index_file(tmp_path / "imagenet_class_index.json")

    data = loaded(imagenet(tmp_path))

    assert data.num_classes == 1000
    for split in ("train", "val", "test"):
        assert data.splits[split].labels.tolist() == [7, 900]


def test_imagenet_without_the_index_file_needs_all_classes(tmp_path):
    write(tmp_path / "train" / WNIDS[5] / "a.JPEG")
    with pytest.raises(
        DataNotFoundError, match=r"has 1 class folders .* expected 1000, or imagenet_class_index"
    ):
        imagenet(tmp_path)
    for wnid in WNIDS:
        (tmp_path / "train" / wnid).mkdir(exist_ok=True)

    assert imagenet(tmp_path).load_split("train").labels.tolist() == [5]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "LOC_val_solution.csv",
            f"ImageId,PredictionString\nILSVRC_2,{WNIDS[3]} 1 2 3 4\nILSVRC_1,{WNIDS[8]} 5 6 7 8\n",
        ),
        ("val.txt", "ILSVRC_1.JPEG 8\nILSVRC_2.JPEG 3\n"),
    ],
)
def test_imagenet_flat_validation_folder(tmp_path, name, text):
    for number in (1, 2):
        write(tmp_path / "val" / f"ILSVRC_{number}.JPEG")
    index = index_file(tmp_path / "classes.json")
    data = imagenet(tmp_path, class_index=str(index))
    with pytest.raises(DataNotFoundError, match="val_labels: got None"):
        data.setup("validate")
    (tmp_path / name).write_text(text)

    data.setup("validate")

    assert data.splits["val"].labels.tolist() == [8, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("490\n361\n", r"whose line 1 is '490'"),
        ("ILSVRC_1.JPEG 1000\n", r"line 1 .* number 0\.\.999"),
        ("ILSVRC_1.JPEG n99999999\n", r"line 1"),
        ("ILSVRC_7.JPEG 3\n", r"which has no line for val/ILSVRC_1\.JPEG"),
    ],
)
def test_imagenet_wrong_label_tables_are_named(tmp_path, text, message):
    write(tmp_path / "val" / "ILSVRC_1.JPEG")
    (tmp_path / "labels.txt").write_text(text)
    data = imagenet(
        tmp_path, class_index=str(index_file(tmp_path / "i.json")), val_labels=str(tmp_path / "labels.txt")
    )

    with pytest.raises(ValueError, match=message):
        data.setup("validate")


@pytest.mark.parametrize("text", ["[]", "{", '{"1": ["a", "b"]}', '{"0": 5}'])
def test_imagenet_wrong_index_files_are_named(tmp_path, text):
    (tmp_path / "val").mkdir()
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"class_index: got .*index\.json"):
        imagenet(tmp_path, class_index=str(tmp_path / "index.json"))


@pytest.mark.skipif(not SHARED.is_file(), reason="the sample of ImageNet files is not beside this checkout")
def test_real_imagenet_files(tmp_path):
    with zipfile.ZipFile(SHARED) as archive:
        found = sorted({name.split("/")[2] for name in archive.namelist()})
    wnids = sorted(found + [f"n9{number:07}" for number in range(950)])
    index = index_file(tmp_path / "imagenet_class_index.json", wnids)
    data = imagenet(SHARED, class_index=str(index), image_size=64, batch_size=25)
    data.setup("validate")

    images, labels = batches(data.val_dataloader())

    assert images.shape == (50, 3, 64, 64)
    assert labels.tolist() == list(range(50))
    assert images.isfinite().all()
    assert images.mean().abs() < 0.5
    assert 0.7 < images.std() < 1.5
    grey = images * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor(
        [0.485, 0.456, 0.406]
    ).view(3, 1, 1)
    assert ((grey[:, 0] - grey[:, 2]).abs().amax((1, 2)) < 1e-5).sum() >= 23


def test_what_macos_packs_beside_the_images_is_left_out(folder):
    path = folder / "mac.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in [*folder.rglob("*.png")]:
            name = f"wrapped/{file.relative_to(folder).as_posix()}"
            archive.write(file, name)
            archive.writestr(f"__MACOSX/{name.replace(file.name, '._' + file.name)}", b"\0")
        archive.writestr("wrapped/.DS_Store", b"\0")
        archive.writestr(".DS_Store", b"\0")
    plain, packed = loaded(module(folder)), loaded(module(path))
    for split, dataset in plain.splits.items():
        assert len(packed.splits[split]) == len(dataset)
    assert packed.classes == plain.classes
