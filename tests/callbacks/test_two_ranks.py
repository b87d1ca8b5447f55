import csv
import json

import pytest
import torch
from lightning.pytorch import Callback
from ranked_training import train

from lightning_n2uq.callbacks import TorchCompile
from lightning_n2uq.strategies import NUQSGDStrategy


def outcome(folder, rank=0):
    return json.loads((folder / f"rank{rank}.json").read_text())


def quant_rows(folder):
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    kinds = ("quant/", "entropy/")
    named = [{k: v for k, v in row.items() if v and k.startswith((*kinds, "step"))} for row in rows]
    return [row for row in named if len(row) > 1]


# Forked workers start in a fraction of the time that fresh interpreters need.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")


def test_two_ranks_log_and_learn_what_one_does(tmp_path):
    train(tmp_path / "one", 1)
    train(tmp_path / "two", 2)
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert outcome(tmp_path / "two", 1) == two  # replicas are equal
    # The penalty is averaged over ranks like the loss: had it been summed, these would differ.
    torch.testing.assert_close(torch.tensor(two["parameters"]), torch.tensor(one["parameters"]))
    rows = list(zip(quant_rows(tmp_path / "one"), quant_rows(tmp_path / "two"), strict=True))
    assert len(rows) > 6
    for expected, got in rows:
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert float(got[name]) == pytest.approx(float(value), abs=1e-4), name


@pytest.mark.integration
def test_bit_widths_change_under_ddp_as_on_one_process(tmp_path):
    train(tmp_path / "one", 1, (4, 2))
    train(tmp_path / "two", 2, (4, 2))
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert outcome(tmp_path / "two", 1) == two
    assert two["bits"] == [2, 2]
    torch.testing.assert_close(torch.tensor(two["parameters"]), torch.tensor(one["parameters"]))


@pytest.mark.integration
@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_penalty_annealing_and_bit_widths_work_with_compressed_gradients(tmp_path, bits):
    train(tmp_path / "one", 1, bits)
    strategy = NUQSGDStrategy(bits=8, min_numel=1, bucket_size=16, start_method="fork")
    train(tmp_path / "two", 2, bits, strategy)
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert outcome(tmp_path / "two", 1) == two
    difference = (torch.tensor(two["parameters"]) - torch.tensor(one["parameters"])).norm()
    assert 0 < difference < 0.05 * torch.tensor(one["parameters"]).norm()


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["ddp_fork", "nuqsgd"])
def test_ranks_compile_what_is_free_of_hooks_and_ramps(tmp_path, kind):
    """Monitor, ramp and a change of width step in and out; only the order of DDP's buckets may differ."""
    ways = {"compiled": TorchCompile(modules=["net"], backend="aot_eager"), "plain": Callback()}
    for name, callback in ways.items():
        nuqsgd = NUQSGDStrategy(bits=8, min_numel=1, bucket_size=16, start_method="fork")
        train(tmp_path / name, 2, (4, 2), "ddp_fork" if kind == "ddp_fork" else nuqsgd, callback)
    compiled, plain = outcome(tmp_path / "compiled"), outcome(tmp_path / "plain")
    assert compiled == outcome(tmp_path / "compiled", 1)  # replicas are equal
    assert compiled["calls"] == [{"compiled": 2, "uncompiled": 6}]
    got, expected = torch.tensor(compiled["parameters"]), torch.tensor(plain["parameters"])
    # Compiled gradients become ready in another order: other buckets, other random numbers.
    assert (got - expected).norm() <= (0 if kind == "ddp_fork" else 0.05) * expected.norm()
