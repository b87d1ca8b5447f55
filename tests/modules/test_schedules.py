import math

import pytest

from lightning_n2uq.modules.schedules import schedule_factor


def test_linear_falls_to_zero_after_the_last_step():
    factor = schedule_factor("linear", 4)
    assert [factor(step) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_cosine_and_constant():
    cosine = schedule_factor("cosine", 4)
    assert [cosine(step) for step in range(5)] == pytest.approx([1, 0.85355339, 0.5, 0.14644661, 0], abs=1e-8)
    assert schedule_factor("constant", math.inf)(10**6) == 1.0


def test_warm_up_comes_before_the_schedule():
    factor = schedule_factor("linear", 6, warmup_steps=2)
    assert [factor(step) for step in range(7)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", 10), "schedule: got 'step', allowed are linear, cosine, constant"),
        (("linear", math.inf), "needs trainer.max_epochs or trainer.max_steps"),
        (("linear", 10, 10), "warmup_steps: got 10, allowed is 0 to 9"),
        (("linear", 10, -1), "warmup_steps: got -1"),
    ],
)
def test_impossible_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule_factor(*arguments)
