"""Every mode of the exchange gives what plain DDP gives: values, not only equality between ranks."""

import numpy as np
import pytest
import torch

from exchange_jobs.values import ALL, EXACT, LATER, LOSSY


def cases(names):
    """The modes, those that combine others marked as integration tests."""
    return [pytest.param(name, marks=pytest.mark.integration) if name in LATER else name for name in names]


@pytest.fixture
def found(request, name):
    """Each rank's numbers by the exchange, those by plain DDP, and the steps that the exchange counted."""
    job, check = ("later_job", "later_values") if name in LATER else ("exchange_job", "values")
    ranks = [rank[check] for rank in request.getfixturevalue(job)]
    modes = [rank[name] for rank in ranks if name in rank]
    assert len(modes) == (EXACT | LOSSY)[name][0].ranks
    return [(mode["exchange"], mode["ddp"], mode["steps"]) for mode in modes]


def tolerance(training):
    """Two numbers have one sum; four are summed in another order, and DDP halves float16 before it sums."""
    if training.dtype == torch.float16:
        return {"rtol": 1e-2, "atol": 5e-5}
    if training.ranks == ALL:
        return (
            {"rtol": 2e-2, "atol": 1e-3} if training.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-7}
        )
    return {"rtol": 0.0, "atol": 0.0}


def test_combinations_are_modes():
    assert (EXACT | LOSSY).keys() > LATER


@pytest.mark.parametrize("name", cases(EXACT))
def test_without_loss_values_are_those_of_plain_ddp(found, name):
    training = EXACT[name][0]
    for ours, theirs, steps in found:
        assert steps == len(ours["gradients"]) == training.steps
        for mine, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
            assert np.abs(expected).max() > 0.01
            np.testing.assert_allclose(mine, expected, **tolerance(training))
        np.testing.assert_allclose(ours["parameters"], theirs["parameters"], **tolerance(training))


@pytest.mark.parametrize("name", cases(LOSSY))
def test_with_loss_the_first_gradient_is_near_plain_ddp_s(found, name):
    _, _, most = LOSSY[name]
    for ours, theirs, _ in found:
        mine, expected = ours["gradients"][0], theirs["gradients"][0]
        error = np.linalg.norm(mine - expected) / np.linalg.norm(expected)
        assert most / 100 < error < most


@pytest.mark.parametrize("name", cases([*EXACT, *LOSSY]))
def test_ranks_have_the_same_bits(found, name):
    ours = [mode["parameters"] for mode, _, _ in found]
    for other in ours[1:]:
        np.testing.assert_array_equal(other, ours[0])
