"""``train.py`` takes a task's recipe if there is one: each is found under its task's name, with what it says."""

from __future__ import annotations

import pytest
from omegaconf.errors import MissingMandatoryValue

from tests.composing import FOLDER, composed

RECIPES = {
    "push_t": (16, [5200, 7400], 2600),
    "lift": (10, [1500], 0),
    "can": (10, [3000], 0),
    "square": (10, [3000, 3000], 0),
    "lift_image": (10, [1000], 0),
    **dict.fromkeys(("can_image", "square_image"), (10, [30000], 10000)),
    "push_t_image": (16, [30000], 10000),
}
"""Task -> horizon, cycles, steps between rollouts."""


def test_every_recipe_is_of_a_task() -> None:
    assert {path.stem for path in (FOLDER / "recipe").glob("*.yaml")} == set(RECIPES)
    assert RECIPES.keys() <= {path.stem for path in (FOLDER / "task").glob("*.yaml")}


@pytest.mark.parametrize("task", RECIPES)
def test_recipe_is_taken(task: str) -> None:
    config = composed("train", f"task={task}")
    recipe = config.optimiser.build(config.seed)
    assert (config.policy.horizon, config.optimiser.cycles, config.rollout.every) == RECIPES[task]
    assert recipe.cycles == tuple(RECIPES[task][1])
    assert config.policy.build(config.task).network.horizon == RECIPES[task][0]


@pytest.mark.parametrize("task", ["tool_hang", "transport"])
def test_task_without_a_recipe_asks_for_one(task: str) -> None:
    with pytest.raises(MissingMandatoryValue, match=r"optimiser\.cycles|rollout\.every"):
        composed("train", f"task={task}")
    given = ["optimiser.cycles=[500]", "rollout.every=0"]
    assert composed("train", f"task={task}", *given).optimiser.build(0).cycles == (500,)
