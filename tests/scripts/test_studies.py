"""What scripts and studies are made of, in this process: what is refused, left out, and said of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench
import calibrate
import eval as evaluation
import latency_budget
import numpy as np
import pytest
import torch
import train
from studies import growth, latency, pareto, stages
from studies.calibration import Calibration
from studies.evaluated import table
from studies.evaluations import read_evaluation, require_same_episodes, run_name, successes
from studies.kept import Kept
from studies.latency import user_loop
from studies.rows import started

from bac.control import LatencyBudget
from bac.errors import CorruptArtefact, InvalidInput, Mismatch, MissingArtefact, Unavailable
from bac.executors import ChunkNoise, ExecutorKind, WeightType
from bac.methods import CrossChunk, full_schedule
from policies.benchmark import Row, executor_rows
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.loading import load_policy, make_schedule
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


SCRIPTS: dict[str, tuple[Callable[[Any, Path], object], list[str]]] = {
    "eval": (evaluation.main, ["checkpoint=nowhere.safetensors"]),
    "calibrate": (calibrate.main, ["checkpoint=nowhere.safetensors"]),
    "latency_budget": (latency_budget.main, ["checkpoint=nowhere.safetensors", "budget_ms=80"]),
    "bench": (bench.main, ["study=wallclock", "checkpoint=nowhere.safetensors"]),
    "train": (train.main, ["demonstrations=nowhere.zarr"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_threads_that_there_cannot_be_refuse_before_anything_is_read(script: str, tmp_path: Path) -> None:
    main, given = SCRIPTS[script]
    with pytest.raises(InvalidInput, match=r"^threads: expected at least 1, got 0; correct the override\.$"):
        main(composed(script, *given, "threads=0"), tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_device_refuses_before_a_policy_or_demonstrations_are_read(script: str, tmp_path: Path) -> None:
    main, given = SCRIPTS[script]
    given = [each for each in given if not each.startswith("checkpoint=")]
    with pytest.raises(InvalidInput, match=r"^device: expected cpu, cuda or cuda:N, got gpu; choose one of these\.$"):
        main(composed(script, *given, "device=gpu"), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["save_every=0"], "save_every: expected at least 1, got 0; correct the override."),
        (["rollout.every=-1"], "rollout.every: expected at least 0, got -1; correct the override."),
        (["rollout.every=1", "rollout.episodes=0"], "rollout.episodes: expected at least 1, got 0; correct the over"),
        (
            ["optimiser.betas=[0.9,0.95,0.99]"],
            "optimiser.betas: expected two, from 0 to below 1, got (0.9, 0.95, 0.99)",
        ),
        (["optimiser.gradient_clip=0"], "optimiser.gradient_clip: expected above 0, got 0.0"),
        (["sampler.steps=1000"], "sampler.steps: expected 1 to 100, got 1000"),
    ],
)
def test_training_that_would_fail_later_refuses_before_demonstrations_are_read(
    tmp_path: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(told)}"):
        train.main(composed("train", "demonstrations=nowhere.zarr", *overrides), tmp_path)


def test_a_horizon_longer_than_every_demonstration_refuses() -> None:
    config = composed("train", "policy.horizon=1000")
    told = (
        "policy.horizon: expected one that fits into the demonstrations, the longest of 60 steps, got 1000; shorten it."
    )
    with pytest.raises(InvalidInput, match=f"^{re.escape(told)}$"):
        train._window_index(np.array([40, 100]), config.policy.build(config.task))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["control=realtime", "latency=mesured"], "latency: expected measured, milliseconds, or the results.json of"),
        (["control=realtime", "latency=true"], "latency: expected measured, milliseconds, or the results.json of"),
        (["control=wallclock", "cache=cross_chunk"], "cache of a control loop: expected one whose chunks stand alone"),
        (["task.rate_hz=50"], "task.rate_hz: expected 10, the rate of push_t, got 50.0; leave it out."),
    ],
)
def test_what_cannot_be_played_refuses_before_a_policy_is_read(tmp_path: Path, overrides: list[str], told: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{re.escape(told)}"):
        evaluation.main(composed("eval", "checkpoint=nowhere.safetensors", *overrides), tmp_path)


@pytest.mark.parametrize("study", ["realtime", "wallclock"])
def test_studies_of_a_loop_refuse_chunks_that_go_on_before_anything_is_timed(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy("push_t")
    kept = tmp_path / "cross_chunk.json"
    make_schedule(CrossChunk(updates=10), policy).save(kept)
    monkeypatch.setattr(LatencyBudget, "measure", lambda *_, **__: pytest.fail("timed"))
    given = ["threads=1", "realtime.rows=[none,cross_chunk 10]", f"wallclock.schedule={kept}"]
    with pytest.raises(
        InvalidInput, match=r"^cache of a control loop: expected one whose chunks stand alone, got cross"
    ):
        bench.main(composed("bench", f"study={study}", f"realtime.kept={tmp_path / 'kept.json'}", *given), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["realtime.latencies_ms=[0,-5]"], "realtime: expected rows, seams, and latencies of at least 0 ms with 0 amo"),
        (["realtime.latencies_ms=[100]"], "realtime: expected rows, seams, and latencies of at least 0 ms with 0 amon"),
        (["realtime.rows=[]"], "realtime: expected rows, seams, and latencies of at least 0 ms with 0 among them, got"),
        (["realtime.parallel=0"], "realtime.parallel: expected at least 1, got 0; correct the override."),
        (["realtime.calls=99"], "realtime.calls: expected at least 100, got 99; correct the override."),
        (["realtime.rows=[none 30]"], "realtime.rows: expected 'none', 'none ddim-10' or 'bac 10', got none 30"),
        (["study=wallclock", "wallclock.floor_s=0.04"], "wallclock.floor_s: expected at least 0.1, got 0.04; correct"),
        (["study=wallclock", "wallclock.load_processes=0"], "wallclock.load_processes: expected at least 1, got 0;"),
        (["executors=[compiledbf16]"], "executors: expected one of auto, eager, compiled, cuda_graph, onnx, got"),
    ],
)
def test_a_study_of_a_loop_refuses_before_anything_is_timed(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studies.realtime.measured_for", lambda *_: pytest.fail("timed"))
    given = ["threads=1", "study=realtime", f"realtime.kept={tmp_path / 'kept.json'}", *overrides]
    with pytest.raises(InvalidInput, match=f"^{re.escape(told)}"):
        bench.main(composed("bench", *given), tmp_path)


def test_a_shipped_policy_is_never_calibrated_by_use_whatever_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "on_first_use", lambda *_: pytest.fail("calibrated"))
    config = composed("eval", "checkpoint=push_t", "cache=search", "cache.gflops=3.21", "threads=1")
    with pytest.raises(MissingArtefact, match=r"search"):
        evaluation.main(config, tmp_path)


@pytest.mark.parametrize("study", ["realtime", "wallclock"])
def test_a_policy_of_another_task_is_played_by_no_study(study: str, tmp_path: Path) -> None:
    config = composed("bench", f"study={study}", "task=square", "checkpoint=can", "threads=1")
    with pytest.raises(Mismatch, match=r"^policy for task=square: expected task square, got can"):
        bench.main(config, tmp_path)


@pytest.mark.parametrize("study", ["realtime", "wallclock"])
def test_studies_of_a_loop_keep_the_environments_rate(study: str, tmp_path: Path) -> None:
    config = composed("bench", f"study={study}", "task.rate_hz=50", "checkpoint=nowhere.safetensors", "threads=1")
    with pytest.raises(InvalidInput, match=r"^task\.rate_hz: expected 10, the rate of push_t, got 50\.0"):
        bench.main(config, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["sampler=ddim", "sampler.steps=16"],
            "family.updates: expected 1 to 16, the steps of ddim-16-trailing, got [20",
        ),
        (["family.methods=[bac,cross_chunk]"], "cache of a control loop: expected one whose chunks stand alone"),
        (
            ["sampler=ddim", "sampler.steps=10", "family.updates=[5]"],
            "family.ddim: expected step counts up to 10, each once, of other samplers than ddim-10-trailing, got [10",
        ),
        (["family.ddim=[200]"], "family.ddim: expected step counts up to 100, each once, of other samplers than ddpm"),
    ],
)
def test_a_bank_that_cannot_be_refuses_by_the_key_that_was_given(
    overrides: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "calibrate_bank", lambda *_: pytest.fail("made"))
    with pytest.raises(InvalidInput, match=f"^{re.escape(told)}"):
        calibrate.main(composed("calibrate", "bank=true", "threads=1", *overrides), tmp_path)


@pytest.mark.parametrize(
    "overrides", [["cache.upstream_blocks=99"], ["cache=bac_weighted", "sensitivity_observations=0"]]
)
def test_calibration_refuses_before_it_measures(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "features", lambda _: pytest.fail("measured"))
    told = r"^cache\.upstream_blocks: expected 0 to 24, got 99|^cache=bac_weighted: expected a profile with sensitivity"
    with pytest.raises(InvalidInput, match=told):
        calibrate.main(composed("calibrate", "threads=1", *overrides), tmp_path)


@pytest.mark.parametrize("text", ["no JSON", "[1, 2]", '{"points": []}', '{"scores": [1.0]}'])
def test_what_is_no_evaluation_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(CorruptArtefact, match=r"results\.json: expected (a JSON document|results of scripts/eval\.py)"):
        read_evaluation(tmp_path)


def test_a_kept_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text("{")
    with pytest.raises(CorruptArtefact, match=r"kept\.json: expected a JSON document of results"):
        Kept(tmp_path / "kept.json")


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


def test_the_full_score_is_a_success() -> None:
    assert successes(played(scores=[0.99, 1.0], success={"mean": 0.5})) == [False, True]
    with pytest.raises(Mismatch, match=r"full score: expected 1\.0, the success rate, got 0\.5; evaluate it again"):
        successes(played(scores=[0.99, 1.0], success={"mean": 1.0}))


def test_success_has_a_difference_of_its_own_where_it_is_not_the_score() -> None:
    def estimate(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.125, "high": mean + 0.125}

    timing = {"latency_ms": {"eager": {"p50": 120.0}}, "control_rate_hz": 8.0, "speedup": 9.0}
    row = {"run": "bac", "gflops": 2.0, "score": estimate(0.75), "score_difference": estimate(-0.25), **timing}
    same = row | {"success": estimate(0.75), "success_difference": estimate(-0.25)}
    other = row | {"success": estimate(0.5), "success_difference": estimate(-0.5)}
    times = "120 | 8.0 | 9.0x |"
    score = "| bac | 2.00 | 0.750 [0.625, 0.875] | -0.250 [-0.375, -0.125] |"
    assert f"{score} 0.750 [0.625, 0.875] | {times}" in table([same], ["eager"])
    told = table([same, other], ["eager"])
    assert f"{score} 0.500 [0.375, 0.625] | -0.500 [-0.625, -0.375] | {times}" in told
    assert "| success | difference, paired | eager ms |" in told.splitlines()[0]


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


def test_memory_is_measured_of_every_row_that_can_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(name, lambda _: pytest.fail("built here"), 10, None) for name in ("small", "nowhere", "large")]
    source = partial(load_policy, "push_t")

    def measured(row: Row, given: object) -> int:
        assert given is source
        if row.name == "nowhere":
            raise Unavailable("no compiler; install one.")
        return len(row.name)

    monkeypatch.setattr(latency, "row_memory", measured)
    assert latency._memory(rows, source) == {"small": 5, "nowhere": None, "large": 5}


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
