"""A run that goes on with fewer or more ranks: every strategy warns, trains to the end and stays sound."""

import pytest
import torch

import runs

STRATEGIES = {
    "nuqsgd": {},
    "nuqsgd with feedback": {"error_feedback": True, "min_numel": 16},
    "nuqsgd_2bit": {"min_numel": 16},
    "nuqsgd all_gather": {"scheme": "all_gather", "error_feedback": True, "min_numel": 16},
    "qsgd": {"min_numel": 16},
    "alq": {"min_numel": 16},
    "nuqsgd_local": {},
    "ddp_powersgd": {},
    "ddp_fp16": {},
    "ddp": {},
}


def strategy(name, arguments):
    kind = name.split()[0]
    if not arguments:
        return kind
    from lightning_n2uq.compression import CODECS

    init = {**dict(CODECS[kind]), **arguments}
    return {"class_path": "lightning_n2uq.strategies.NUQSGDStrategy", "init_args": init}


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_on_with_another_number_of_ranks(tmp_path, name, before, after):
    runs.write_config(tmp_path, strategy=strategy(name, STRATEGIES[name]), devices=before)
    stopped = runs.fit(tmp_path, stop_at="4 SIGTERM")
    assert stopped.returncode == 143, stopped.stderr
    done = runs.fit(tmp_path, "--resume", "auto", "--trainer.devices", str(after))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"the checkpoint is of {before} process" in done.stderr
    (folder,) = runs.run_folders(tmp_path)
    last = runs.newest(folder)
    assert last["epoch"] == 2
    assert len(last["exact_resume"]["ranks"]) == after
    assert all(torch.isfinite(v).all() for v in last["state_dict"].values())
    again = runs.fit(tmp_path, "--resume", "auto", "--trainer.devices", str(after))
    assert again.returncode == 0, again.stderr
