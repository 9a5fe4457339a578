"""``filter_key=`` reaches what reads demonstrations, and belongs to what a training run is of."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import calibrate
import eval as evaluation
import pytest
import train
from studies import bank

from bac.errors import Mismatch
from configs.tasks import TaskDemonstrations, demonstrations
from tests.composing import composed


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    ("script", "reader", "overrides"),
    [
        (train, train, ["rollout.every=0"]),
        (evaluation, evaluation, []),
        (calibrate, calibrate, []),
        (calibrate, bank, ["bank=true", "executor=eager"]),
    ],
    ids=["train", "eval", "calibrate", "bank"],
)
def test_it_is_handed_on(
    script: Any, reader: ModuleType, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(task: Any, path: str | None, filter_key: str | None) -> TaskDemonstrations:
        raise Asked(f"{task.name}, {path}, {filter_key}")

    monkeypatch.setattr(reader, "demonstrations", ask)
    name = Path(script.__file__).stem
    with pytest.raises(Asked, match=r"^push_t, a\.hdf5, valid$"):
        script.main(composed(name, "demonstrations=a.hdf5", "filter_key=valid", *overrides), tmp_path)


def test_a_run_is_not_resumed_on_other_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(task: Any, path: str | None, filter_key: str | None) -> TaskDemonstrations:
        whole = demonstrations(task)
        ends = whole.episode_ends[: 2 if filter_key == "train" else 1]
        seen = {key: values[: ends[-1]] for key, values in whole.observations.items()}
        return TaskDemonstrations(seen, whole.actions[: ends[-1]], ends)

    monkeypatch.setattr(train, "demonstrations", some)
    sizes = ["policy.layers=1", "policy.width=16", "policy.heads=2", "policy.train_steps=10"]
    steps = ["optimiser.batch_size=2", "optimiser.warmup_steps=1", "optimiser.cycles=[2]", "rollout.every=0"]
    train.main(composed("train", *sizes, *steps, "filter_key=train"), tmp_path)
    with pytest.raises(
        Mismatch, match=r"got another keypoints, .*actions, .*; give the same .*, filter_key and device"
    ):
        train.main(composed("train", *sizes, *steps, "filter_key=valid"), tmp_path)
