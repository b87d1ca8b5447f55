import math

import pytest

from lightning_n2uq.utils.validation import check, check_choice, check_integer, check_number


def test_fitting_values_are_returned():
    assert check_choice("mode", "a", ("a", "b")) == "a"
    assert check_integer("count", 3, 1) == 3
    assert check_integer("count", 3, 1, 3) == 3
    assert check_number("rate", 0, 0.0) == 0
    assert check_number("share", 1.0, 0.0, 1.0, above=True) == 1.0
    check(True, "x", 1, "is anything")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check(False, "betas", [1, 2], "are two numbers"),
            "betas: got [1, 2], allowed are two numbers",
        ),
        (lambda: check_choice("mode", "c", ("a", "b")), "mode: got 'c', allowed are a, b"),
        (lambda: check_integer("count", 0, 1), "count: got 0, allowed are integers from 1"),
        (lambda: check_integer("count", True, 1), "count: got True, allowed are integers from 1"),
        (lambda: check_integer("count", 2.0, 1), "count: got 2.0, allowed are integers from 1"),
        (lambda: check_integer("bits", 9, 2, 8), "bits: got 9, allowed is 2 to 8"),
        (lambda: check_number("lr", math.nan, 0.0), "lr: got nan, allowed is 0 or more"),
        (lambda: check_number("lr", math.inf, 0.0), "lr: got inf, allowed is 0 or more"),
        (lambda: check_number("lr", 0.0, 0.0, above=True), "lr: got 0.0, allowed is above 0"),
        (lambda: check_number("lr", "1", 0.0), "lr: got '1', allowed is 0 or more"),
        (lambda: check_number("share", 1.5, 0, 1), "share: got 1.5, allowed is 0 to 1"),
        (lambda: check_number("u", 0, 0, 1, above=True), "u: got 0, allowed is above 0 and up to 1"),
        (lambda: check_number("m", 1, 0, 1, below=True), "m: got 1, allowed is 0 or more and below 1"),
    ],
)
def test_others_raise_one_line_with_name_value_and_what_is_allowed(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is compared
        call()
    assert str(error.value) == message
