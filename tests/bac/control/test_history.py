import numpy as np
import pytest

from bac.control import ObservationHistory
from bac.errors import InvalidInput


def test_the_first_observation_stands_for_those_before_it() -> None:
    history = ObservationHistory(3)
    for value in (1.0, 2.0):
        history.append({"state": np.array([value])})
    np.testing.assert_array_equal(history.stacked()["state"], [[1.0], [1.0], [2.0]])


def test_only_the_last_are_kept() -> None:
    history = ObservationHistory(2)
    for value in range(5):
        history.append({"state": np.array([value])})
    np.testing.assert_array_equal(history.stacked()["state"], [[3], [4]])


def test_nothing_to_stack_and_no_steps_are_refused() -> None:
    with pytest.raises(InvalidInput, match="none yet"):
        ObservationHistory(2).stacked()
    with pytest.raises(InvalidInput, match="at least 1"):
        ObservationHistory(0)
