"""``scripts/train.py`` around its rollouts: what they need is asked for first, and none of them costs a step."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import train

from configs.schema import TrainConfig
from envs.errors import EnvError
from policies.training import LOG_FILE, STATE_FILE
from tests.composing import composed

SMALL = [
    "policy.layers=1",
    "policy.width=16",
    "policy.heads=2",
    "policy.train_steps=10",
    "optimiser.batch_size=4",
    "optimiser.warmup_steps=1",
    "optimiser.cycles=[4]",
    "rollout.every=2",
    "rollout.episodes=1",
    "sampler.steps=2",
]


def small(*overrides: str) -> TrainConfig:
    return composed("train", *SMALL, *overrides)


def test_rollout_that_dies_costs_no_step_and_is_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_score", lambda *_: (_ for _ in ()).throw(EnvError("no screen")))
    with pytest.raises(EnvError, match="no screen"):
        train.main(small(), tmp_path)
    assert torch.load(tmp_path / STATE_FILE, weights_only=True)["step"] == 2
    scored: list[int] = []

    def score(config: TrainConfig, checkpoint: Any) -> float:
        scored.append(checkpoint.training["step"])
        return 0.5

    monkeypatch.setattr(train, "_score", score)
    train.main(small(), tmp_path)
    train.main(small(), tmp_path)
    assert scored == [2, 4]
    with (tmp_path / LOG_FILE).open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["score"]] == ["2", "4"]


def test_missing_environment_is_told_before_any_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(task: Any, *, draws: bool) -> None:
        raise EnvError(f"{task.name} with draws={draws}")

    monkeypatch.setattr(train, "require_environment", refuse)
    monkeypatch.setattr(train, "demonstrations", lambda *_: pytest.fail("read"))
    with pytest.raises(EnvError, match="push_t with draws=False"):
        train.main(small(), tmp_path)
    # Without rollouts nothing is played.
    monkeypatch.setattr(train, "demonstrations", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main(small("rollout.every=0"), tmp_path)
