import json

import pytest
import torch
from ranked_quantization import Ranked, train
from torch.multiprocessing import ProcessRaisedException

from lightning_n2uq.strategies import NUQSGDStrategy

# Forked workers start in a fraction of the time that fresh interpreters need.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


def outcome(folder, rank=0):
    return json.loads((folder / f"rank{rank}.json").read_text())


@pytest.mark.parametrize("compressed", [False, True], ids=["ddp", "nuqsgd"])
def test_two_ranks_fit_their_ranges_together_and_stay_equal(tmp_path, compressed):
    strategy = "ddp_fork"
    if compressed:
        strategy = NUQSGDStrategy(bits=8, min_numel=1, bucket_size=16, start_method="fork")
    train(tmp_path / "one")
    train(tmp_path / "two", strategy)
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert outcome(tmp_path / "two", 1) == two  # replicas are equal
    torch.testing.assert_close(
        torch.tensor(two["offsets"]), torch.tensor(one["offsets"]), rtol=0.2, atol=0.05
    )
    difference = (torch.tensor(two["parameters"]) - torch.tensor(one["parameters"])).norm()
    assert difference < 0.2 * torch.tensor(one["parameters"]).norm()
    loaded = Ranked.load_from_checkpoint(tmp_path / "two" / "end.ckpt")
    values = torch.cat([p.detach().flatten() for p in loaded.parameters()])
    assert torch.equal(values, torch.tensor(two["parameters"]))


def test_a_module_left_in_floats_by_forked_ranks_is_told(tmp_path):
    # Warnings are errors in these tests, in the ranks as well.
    with pytest.raises(ProcessRaisedException, match="stays without quantizers where ranks are spawned or"):
        train(tmp_path, "ddp_fork", converted=False, epochs=1)
