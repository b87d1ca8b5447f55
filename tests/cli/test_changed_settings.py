"""What becomes of settings that differ between a run and the command that goes on with it."""

import copy

import pytest

from lightning_n2uq.cli.changed_settings import compare
from lightning_n2uq.utils.nested import flatten

SAVED = {
    "seed_everything": 0,
    "trainer": {
        "max_epochs": 3, "precision": "32-true", "strategy": "nuqsgd", "devices": 2,
        "accumulate_grad_batches": 1,
        "callbacks": [
            {"class_path": "QuantizationMonitor", "init_args": {"every_n_steps": 4}},
            {"class_path": "lightning_n2uq.callbacks.EntropyRegularizer", "init_args": {"weight": 0.01}},
        ],
    },
    "checkpoint": {"monitor": "val/acc"},
    "model": {"class_path": "X", "init_args": {"lr": 0.005, "backbone_args": {"width": 4}}},
    "data": {
        "class_path": "Y",
        "init_args": {"batch_size": 64, "split_seed": 0, "num_workers": 0, "root": "a"},
    },
}  # fmt: skip


def changed(path, value):
    config = copy.deepcopy(SAVED)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return config


def keys(changes):
    return [change.key for change in changes]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("seed_everything",), 1),
        (("trainer", "accumulate_grad_batches"), 2),
        (("model", "init_args", "lr"), 0.1),
        (("model", "init_args", "backbone_args", "width"), 8),
        (("model", "class_path"), "Z"),
        (("data", "init_args", "batch_size"), 128),
        (("data", "init_args", "split_seed"), 1),
    ],
)
def test_what_a_resumed_run_would_not_follow_is_refused(path, value):
    found = compare(SAVED, changed(path, value))
    assert keys(found.refused) == [".".join(path)]
    assert found.method == found.ranks == []
    assert str(found.refused[0]).endswith(f", got {value!r}")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("trainer", "max_epochs"), 6),
        (("trainer", "log_every_n_steps"), 1),
        (("checkpoint", "monitor"), "val/loss"),
        (("data", "init_args", "num_workers"), 3),
        (("trainer", "callbacks", 0, "init_args", "every_n_steps"), 9),
        (("trainer", "callbacks"), SAVED["trainer"]["callbacks"][1:]),  # without the monitor
    ],
)
def test_what_a_resumed_run_follows_is_no_change(path, value):
    assert compare(SAVED, changed(path, value)) == ([], [], [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("trainer", "precision"), "bf16-mixed"),
        (("trainer", "strategy"), "nuqsgd_2bit"),
        (("data", "init_args", "root"), "b"),  # moved, or other images: nobody can tell
        (("trainer", "callbacks", 1, "init_args", "weight"), 0.5),
        (("trainer", "callbacks"), []),
    ],
)
def test_another_method_is_another_experiment(path, value):
    found = compare(SAVED, changed(path, value))
    assert found.method
    assert found.refused == found.ranks == []


def test_another_number_of_ranks_is_told_apart():
    assert keys(compare(SAVED, changed(("trainer", "devices"), 1)).ranks) == ["trainer.devices"]


def test_arguments_of_another_release_are_not_compared_and_neither_is_a_missing_config():
    older = copy.deepcopy(SAVED)
    del older["model"]["init_args"]["lr"]
    assert compare(older, SAVED) == ([], [], [])
    assert compare({}, SAVED) == ([], [], [])
    assert flatten(older)["model.init_args.backbone_args.width"] == 4
