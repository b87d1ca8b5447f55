"""One test for every private name of Lightning, as in `test_compat.py`."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_n2uq.utils import compat_lightning


def test_a_process_group_is_joined_through_a_store(tmp_path):  # lightning 2.5.5, 2.6.6
    from datetime import timedelta

    from lightning.fabric.plugins.environments import LightningEnvironment

    store = torch.distributed.FileStore(f"{tmp_path}/store", 1)
    try:
        compat_lightning.init_process_group(LightningEnvironment(), "gloo", store, timedelta(seconds=10))
        assert torch.distributed.get_world_size() == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_strategy_names_its_backend():  # lightning 2.5.5, 2.6.6
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", parallel_devices=[torch.device("cpu")])
    assert compat_lightning.process_group_backend(strategy) == "gloo"
    assert (
        compat_lightning.process_group_backend(DDPStrategy(parallel_devices=[torch.device("cpu")])) == "gloo"
    )


@pytest.mark.parametrize("wanted", [False, True])
def test_synchronized_batch_norm_is_seen(wanted):
    runner = pl.Trainer(accelerator="cpu", strategy="ddp", sync_batchnorm=wanted, logger=False)
    assert compat_lightning.synchronizes_batch_norm(runner.strategy) == wanted


class StatefulLoader(torch.utils.data.DataLoader):
    """Four batches; remembers what state it was given."""

    given = None

    def __init__(self):
        super().__init__(torch.rand(4, 2))

    def state_dict(self):
        return {"batches": 2}

    def load_state_dict(self, state):
        self.given = state


class Worse(pl.LightningModule):
    """Its first epoch is its best."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("score", -float(self.current_epoch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_of(folder, **options):
    switches = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
    }
    return pl.Trainer(default_root_dir=folder, logger=False, limit_val_batches=1, **switches, **options)


def test_a_trainer_says_whether_validation_follows_a_batch(tmp_path):  # lightning 2.5.5, 2.6.6
    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(compat_lightning.validation_follows(trainer))

    options = {"max_epochs": 1, "val_check_interval": 2, "enable_checkpointing": False}
    trainer_of(tmp_path, callbacks=[Watch()], **options).fit(Worse(), StatefulLoader(), StatefulLoader())
    assert seen == [False, True, False, True]


def test_loaders_are_told_where_they_stopped(tmp_path):  # lightning 2.5.5, 2.6.6
    loader, trainer = StatefulLoader(), trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(Worse(), loader, StatefulLoader())
    compat_lightning.place_loaders(trainer)
    assert loader.given is None
    trainer.fit_loop._combined_loader_states_to_load = [{"batches": 3}]
    compat_lightning.place_loaders(trainer)
    compat_lightning.place_loaders(trainer)
    assert loader.given == {"batches": 3}
    assert trainer.fit_loop._combined_loader_states_to_load == []


def test_a_trainer_of_one_device_knows_what_started_it(tmp_path):  # lightning 2.5.5, 2.6.6
    from lightning.fabric.plugins.environments import LightningEnvironment

    assert isinstance(compat_lightning.cluster_environment(trainer_of(tmp_path)), LightningEnvironment)


def test_the_last_checkpoint_is_renewed_after_the_best_epoch(tmp_path):  # lightning 2.5.5, 2.6.6
    from lightning_n2uq.checkpointing import BestAndLastModelCheckpoint

    saver = BestAndLastModelCheckpoint(tmp_path, monitor="score", mode="max", save_last=True)
    trainer_of(tmp_path, max_epochs=3, callbacks=[saver]).fit(Worse(), StatefulLoader(), StatefulLoader())
    epochs = [
        torch.load(path, weights_only=True)["epoch"]
        for path in (saver.best_model_path, saver.last_model_path)
    ]
    assert epochs == [0, 2]


def test_the_launcher_hands_its_children_to_another_observer(monkeypatch):  # Lightning 2.5.5, 2.6
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies.launchers import subprocess_script

    seen = []
    monkeypatch.setattr(subprocess_script, "_launch_process_observer", None)
    compat_lightning.observe_children_with(seen.append)
    launcher = subprocess_script._SubprocessScriptLauncher(LightningEnvironment(), 1, 1)
    monkeypatch.setattr(launcher, "_call_children_scripts", lambda: None)
    launcher.launch(lambda: None)
    assert seen == [launcher.procs]


def test_which_trainer_starts_its_ranks_by_running_the_command_again():  # Lightning 2.5.5, 2.6
    common = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    assert compat_lightning.starts_children(pl.Trainer(strategy="ddp", **common))
    assert not compat_lightning.starts_children(pl.Trainer(strategy="ddp_spawn", **common))


def test_a_finder_says_whether_it_ends_after_its_search():  # lightning 2.5.5, 2.6.6
    from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

    for finder in (BatchSizeFinder(), LearningRateFinder()):
        assert not compat_lightning.exits_early(finder)


def test_a_saver_is_told_what_its_last_checkpoint_is_of():  # Lightning 2.5.5, 2.6.6
    from types import SimpleNamespace

    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(save_last=True)
    trainer = SimpleNamespace(
        global_step=7, ckpt_path="last.ckpt", fast_dev_run=False, sanity_checking=False,
        state=SimpleNamespace(fn="fit"),
    )  # fmt: skip
    assert not saver._should_skip_saving_checkpoint(trainer)
    compat_lightning.last_is_saved(saver, trainer)
    assert saver._should_skip_saving_checkpoint(trainer)
    assert saver._last_checkpoint_saved == "last.ckpt"


def test_what_loads_checkpoints_can_be_wrapped_once(monkeypatch):
    from lightning.pytorch.core import saving

    monkeypatch.setattr(saving, "_load_state", lambda: "loaded")
    for _ in range(2):
        compat_lightning.wrap_loading(lambda load: lambda: f"wrapped {load()}")
    assert saving._load_state() == "wrapped loaded"


def test_the_checkpoint_to_come_is_known_in_setup(tmp_path):
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    seen = []

    class Asking(Callback):
        def setup(self, trainer, pl_module, stage):
            seen.append(compat_lightning.checkpoint_to_come(trainer))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, fast_dev_run=1, callbacks=[Asking()], **quiet)
    trainer.fit(BoringModel())
    trainer.strategy.connect(BoringModel())
    trainer.save_checkpoint(path := tmp_path / "x.ckpt")
    trainer.test(BoringModel(), ckpt_path=path, verbose=False)
    assert seen == [None, str(path)]


def test_forked_ranks_hand_their_weights_back():  # lightning 2.6
    quiet = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    assert compat_lightning.hands_weights_back(pl.Trainer(strategy="ddp_fork", **quiet))
    assert not compat_lightning.hands_weights_back(pl.Trainer(strategy="ddp", **quiet))


def test_a_resumed_runs_loaders_are_iterated_again(tmp_path):  # lightning 2.5.5, 2.6.6
    counts = []

    class Counting(StatefulLoader):
        def __iter__(self):
            counts.append(len(counts))
            return super().__iter__()

    class Again(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before = len(counts)
            compat_lightning.iterate_again(trainer)
            assert len(counts) == before + 1

    options = {"max_epochs": 1, "enable_checkpointing": False}
    trainer_of(tmp_path, callbacks=[Again()], **options).fit(Worse(), Counting(), StatefulLoader())
    assert counts == [0, 1]
    compat_lightning.iterate_again(trainer_of(tmp_path))  # before a fit there is nothing to iterate


def test_a_module_tells_its_trainer(tmp_path):  # lightning 2.5.5, 2.6.6
    module, trainer = Worse(), trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False)
    assert compat_lightning.attached_trainer(module) is None
    assert compat_lightning.attached_trainer(nn.Linear(1, 1)) is None
    trainer.fit(module, StatefulLoader(), StatefulLoader())
    assert compat_lightning.attached_trainer(module) is trainer


def test_the_file_of_plain_values_in_a_folder_of_shards(tmp_path):  # lightning 2.6
    from lightning.fabric.strategies.model_parallel import _is_sharded_checkpoint

    file, folder = tmp_path / "file.ckpt", tmp_path / "folder.ckpt"
    folder.mkdir()
    assert compat_lightning.checkpoint_file(str(file)) == str(file)
    assert not _is_sharded_checkpoint(folder)
    (folder / "meta.pt").touch()
    assert _is_sharded_checkpoint(folder)
    assert compat_lightning.checkpoint_file(str(folder)) == str(folder / "meta.pt")


def test_what_wandb_removed_is_not_handed_to_it(tmp_path) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    compat_lightning.without_void_settings(logger)
    assert "anonymous" not in logger._wandb_init
    chosen = WandbLogger(save_dir=str(tmp_path), offline=True, anonymous=True)
    compat_lightning.without_void_settings(chosen)
    assert chosen._wandb_init["anonymous"] == "allow"
