"""Sampler tables refuse what no sampler can have made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from toys import toy_sampler

from bac.errors import InvalidInput


def test_name_is_what_files_are_called() -> None:
    assert toy_sampler(5).name == "toy-5"
    identity = {"name": "ddim", "steps": 5, "spacing": "trailing", "betas": "squaredcos_cap_v2"}
    assert toy_sampler(5, identity).name == "ddim-5-trailing"


def test_identity_cannot_change() -> None:
    mine = {"name": "toy", "steps": 5}
    table = toy_sampler(5, mine)
    mine["steps"] = 6
    assert table.identity == {"name": "toy", "steps": 5}
    with pytest.raises(TypeError, match="does not support item assignment"):
        table.identity["steps"] = 6  # type: ignore[index]


@pytest.mark.parametrize(
    "column",
    [
        "recover_sample",
        "recover_estimate",
        "to_original",
        "to_sample",
        "to_estimate",
        "to_noise",
        "to_previous",
    ],
)
@pytest.mark.parametrize("values", [np.ones(4), np.array([1, 1, np.nan, 1, 1]), np.array([1, 1, 1, 1, np.inf])])
def test_refuses_a_bad_column(column: str, values: np.ndarray) -> None:
    with pytest.raises(
        InvalidInput, match="expected finite columns of one length, decreasing time steps and nothing before"
    ):
        replace(toy_sampler(5), **{column: values})


@pytest.mark.parametrize("timesteps", [[0, 1, 2, 3, 4], [4, 3, 3, 1, 0], [4, 3, 2, 1]])
def test_refuses_time_steps_that_do_not_decrease(timesteps: list[int]) -> None:
    with pytest.raises(InvalidInput, match=r"sampler table .*toy.*, got time steps \["):
        replace(toy_sampler(5), timesteps=np.array(timesteps))


def test_refuses_no_steps() -> None:
    with pytest.raises(InvalidInput, match=r"got time steps \[\]; correct the sampler's parameters"):
        toy_sampler(0)


def test_refuses_a_first_step_that_looks_back() -> None:
    table = toy_sampler(5)
    assert replace(table, to_previous=np.array([0, 1, 1, 1, 1])).to_previous[1] == 1
    with pytest.raises(InvalidInput, match="nothing before the first"):
        replace(table, to_previous=np.array([1, 1, 1, 1, 1]))
