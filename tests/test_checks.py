"""Checks of single values: what is taken, and that a message names the argument and the range."""

import numpy as np
import pytest
import torch

from diffusers_sparse3d.checks import check_choice, check_integer, check_number


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_integers_of_all_kinds_become_int(value):
    assert check_integer("size", value, 3, 3) == 3 and type(check_integer("size", value)) is int


@pytest.mark.parametrize("value", [2, 5, 3.0, "3", None, True, [3], np.float32(3), float("nan")])
def test_what_is_no_integer_of_the_range(value):
    with pytest.raises(ValueError, match="`size` must be an integer from 3 to 4, got"):
        check_integer("size", value, 3, 4)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(1), np.int8(1)])
def test_numbers_of_all_kinds_become_float(value):
    assert check_number("level", value, 0, 1) == value and type(check_number("level", value)) is float


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), "0", None, True, 1j, [0.5]])
def test_what_is_no_number_of_the_range(value):
    with pytest.raises(ValueError, match="`level` must be a finite number from 0 to 1, got"):
        check_number("level", value, 0, 1)


def test_ranges_in_words():
    with pytest.raises(ValueError, match="an integer of at least 2, got 1"):
        check_integer("size", 1, 2)
    with pytest.raises(ValueError, match="a finite number of at most 2, got 3"):
        check_number("level", 3, most=2)


def test_choices():
    check_choice("mode", "a", ("a", "b"))
    for value in ("c", None, [], ["a"]):
        with pytest.raises(ValueError, match="`mode` must be one of"):
            check_choice("mode", value, ("a", "b"))
