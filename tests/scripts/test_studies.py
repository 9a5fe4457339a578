"""What scripts and studies are made of, in this process: what is refused, left out, and said of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import eval as evaluation
import pytest
import torch
from studies import growth, pareto, stages
from studies.evaluations import require_same_episodes, run_name
from studies.latency import user_loop
from studies.rows import started

from bac.errors import InvalidInput, Mismatch, Unavailable
from bac.executors import ChunkNoise, ExecutorKind, WeightType
from bac.methods import full_schedule
from policies.benchmark import executor_rows
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_trunk import DiffusionTransformerTrunk
from tests.composing import composed
from tests.policies.networks import small_image_checkpoint, small_policy


@pytest.mark.parametrize(
    "override",
    ["episodes=0", "video=-1", "parallel=0", "processes=0", "threads=0", "latency_calls=0", "error_observations=0"],
)
def test_bad_numbers_of_an_evaluation_refuse_before_anything_is_read(override: str, tmp_path: Path) -> None:
    config = composed("eval", "checkpoint=nowhere.safetensors", override)
    name, given = override.split("=")
    with pytest.raises(InvalidInput, match=rf"^{name}: expected at least [01], got {given}; correct the override\.$"):
        evaluation.main(config, tmp_path)


def played(**changes: Any) -> dict[str, Any]:
    """Return what matters here of an evaluation's results."""
    sampler = {"name": "ddpm", "steps": 100, "train_steps": 100}
    return {
        "seed": 5,
        "episodes": 2,
        "scores": [0.25, 0.5],
        "schedule": {"method": "none", "parameters": {}, "sampler": sampler, "checkpoint": "c", "digest": "d"},
        "executor": {"kind": "compiled", "weights": "fp32", "because": None},
        "provenance": {"config": {"task": {"max_steps": 300}}},
    } | changes


REALTIME = {"control": {"cached": {"mode": "realtime"}}}
SHORTER = {"provenance": {"config": {"task": {"max_steps": 200}}}}
HALF = {"executor": {"kind": "compiled", "weights": "bf16", "because": None}}


def test_a_name_says_what_is_unusual_about_a_run() -> None:
    def at(latency: object) -> dict[str, Any]:
        return {"provenance": {"config": {"latency": latency, "control": {"seam": "replace"}}}} | REALTIME

    assert run_name(played()) == "none"
    assert run_name(played(**HALF)) == "none, bf16"
    assert run_name(played(**at(60))) == "none, realtime at 60 ms, replace"
    assert run_name(played(**HALF, **at("measured"))) == "none, bf16, realtime at measured latency, replace"


def test_episodes_of_another_length_are_not_paired() -> None:
    require_same_episodes(played(), played(**HALF))
    with pytest.raises(Mismatch, match="longest episode, control steps: expected 300, got 200; evaluate both"):
        require_same_episodes(played(), played(**SHORTER))


@pytest.mark.parametrize(
    ("changes", "taken"), [({}, True), (REALTIME, False), (SHORTER, False), (HALF, False), ({"seed": 6}, False)]
)
def test_only_what_was_played_alike_is_taken_for_played(changes: dict[str, Any], taken: bool, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(played(**changes)))
    assert list(pareto._evaluated([str(path)], range(5, 7), 300)) == ["d"] * taken


def policy_of_a_study(monkeypatch: pytest.MonkeyPatch, policy: DiffusionPolicy) -> None:
    monkeypatch.setattr(stages, "load_policy", lambda *_, **__: policy)


def test_a_start_that_is_not_to_be_had_is_told_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    policy_of_a_study(monkeypatch, small_policy())
    seconds = iter([6.0, 1.0, 2.0, 3.0])

    def start(work: Callable[[], float]) -> float:
        try:
            return next(seconds)
        except StopIteration:
            raise Unavailable("no compiler; install one.") from None

    monkeypatch.setattr(stages, "_in_new_process", start)
    starts = stages.time_starts(composed("bench"))
    assert starts == {
        "compiled fp32": {"first_s": 6.0, "second_s": 2.0, "ratio": 3.0},
        "compiled bf16": {"unavailable": "no compiler; install one."},
    }
    told = stages.starts_markdown(starts)
    assert "| compiled fp32 | 6.00 | 2.00 | 3x |" in told
    assert "- compiled bf16: not here; no compiler; install one." in told
    assert "not here" in stages.starts_markdown({"compiled fp32": {"unavailable": "no"}})


def test_stages_of_an_image_policy_are_timed_without_demonstrations(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    policy = DiffusionPolicy(small_image_checkpoint())
    policy_of_a_study(monkeypatch, policy)
    full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance).save(tmp_path / "full.json")
    config = composed("bench", "task=push_t_image", "calls=1", f"stages_schedule={tmp_path / 'full.json'}")
    assert "denoising" in stages.time_stages(config)["latency_ms"]


def test_weights_that_a_gpu_does_not_store_are_a_row_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    named = {"full": full_schedule(policy.trunk.blocks, policy.sampler.steps, policy.provenance)}
    rows = list(executor_rows(policy, named, ExecutorKind.COMPILED, WeightType.BF16))
    monkeypatch.setattr(DiffusionTransformerTrunk, "device", torch.device("cuda"))
    built, missing = started(rows, policy)
    assert not built
    told = "executor compiled bf16: expected a CPU, got cuda; use fp32 weights."
    assert missing == {"compiled bf16, full": told}


def test_users_loop_gives_the_network_time_steps_on_its_device() -> None:
    seen: list[torch.device] = []

    def network(sample: torch.Tensor, timestep: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        seen.append(timestep.device)
        return sample

    loop = user_loop(small_policy(), network, steps=3, ddim=True)  # type: ignore[arg-type]
    elsewhere = torch.zeros(1, 6, 2, device="meta")
    loop(elsewhere, ChunkNoise(elsewhere, elsewhere[None]))
    assert seen == [torch.device("meta")] * 3


def test_growth_on_a_gpu_refuses(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^device of study=growth: expected cpu, .*, got cuda; time a GPU with"):
        growth.run(composed("bench", "study=growth", "device=cuda"), tmp_path)
