"""The path of the data, end to end and small: demonstrations, training, calibration, evaluation, comparison."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from bac.profile import FeatureProfile
from bac.statistics import mean_estimate
from tests.commands import run_script

SMALL = [
    "policy.layers=2",
    "policy.width=32",
    "policy.heads=2",
    "policy.train_steps=10",
    "optimiser.batch_size=8",
    "optimiser.warmup_steps=1",
    "rollout.every=0",
    "sampler.steps=2",
    "threads=1",
]


def _run(folder: Path, script: str, *overrides: str, ok: bool = True) -> str:
    done = run_script(folder, script, *overrides, status=0 if ok else 1)
    return done.stdout if ok else done.stderr


def _results(folder: Path, script: str) -> tuple[Path, dict]:
    # A refused run leaves a folder without results.
    newest = max((folder / "outputs" / script).glob("*/results.json"))
    return newest.parent, json.loads(newest.read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy trained for 4 steps and calibrated."""
    folder = tmp_path_factory.mktemp("path")
    _run(folder, "train", *SMALL, "optimiser.cycles=[4]", "save_every=2", "output=run")
    _run(
        folder,
        "calibrate",
        "checkpoint=run/checkpoint.safetensors",
        "observations=4",
        "batch=2",
        "sensitivity_observations=2",
        "budgets=[2]",
        "cache.updates=3",
    )
    return folder


def test_schedule_made_with_other_parameters_is_not_overwritten(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    kept = tmp_path / "run" / "schedules" / "ddpm-10" / "bac-s3.json"
    profile = tmp_path / "run" / "profiles" / "ddpm-10.zarr.zip"
    before = kept.read_bytes(), profile.stat().st_mtime_ns
    few = ["checkpoint=run/checkpoint.safetensors", "observations=3", "sensitivity_observations=1", "cache.updates=3"]
    other = [*few, "cache.upstream_blocks=2"]
    told = _run(tmp_path, "calibrate", *other, ok=False)
    assert told == (
        "error: kept schedule run/schedules/ddpm-10/bac-s3.json: expected one made with upstream_blocks=2, "
        "got upstream_blocks=5; delete it, or run scripts/calibrate.py with overwrite=true.\n"
    )
    assert before == (kept.read_bytes(), profile.stat().st_mtime_ns)
    _run(tmp_path, "calibrate", *few)
    _run(tmp_path, "calibrate", *other, "overwrite=true")
    assert json.loads(kept.read_text())["parameters"]["upstream_blocks"] == 2


def test_kept_profile_of_another_number_of_observations_is_refused(trained: Path) -> None:
    few = ["checkpoint=run/checkpoint.safetensors", "cache.updates=3", "reuse=true", "observations=3"]
    told = _run(trained, "calibrate", *few, ok=False)
    assert told == (
        "error: kept feature profile run/profiles/ddpm-10.zarr.zip: expected 3 observations, got 4; "
        "give observations=4, or reuse=false to measure anew.\n"
    )


def _evaluate(folder: Path, *overrides: str) -> dict:
    small = ["checkpoint=run/checkpoint.safetensors", "episodes=2", "task.max_steps=12", "latency_calls=2"]
    _run(folder, "eval", *small, "error_observations=3", "threads=1", *overrides)
    return _results(folder, "eval")[1]


def test_training_writes_checkpoint_log_curve_and_results(trained: Path) -> None:
    written = {path.name for path in (trained / "run").iterdir()}
    assert {
        "checkpoint.safetensors",
        "training.pt",
        "training_log.csv",
        "training_curve.png",
        "results.json",
    } <= written
    assert json.loads((trained / "run" / "results.json").read_text())["steps"] == 4


def test_training_again_resumes_and_other_recipe_refuses(trained: Path) -> None:
    told = _run(trained, "train", *SMALL, "optimiser.cycles=[4]", "save_every=2", "output=run")
    assert f"resumed {trained / 'run'} at step 4" in told
    told = _run(trained, "train", *SMALL, "optimiser.cycles=[5]", "output=run", ok=False)
    assert told.startswith(f"error: training state {trained}/run/training.pt: expected")
    assert len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("override", "other"), [("policy.width=64", "policy"), ("task.least_range=0.5", "least_range")]
)
def test_a_finished_run_of_another_policy_or_range_keeps_its_checkpoint(
    trained: Path, override: str, other: str
) -> None:
    before = (trained / "run" / "checkpoint.safetensors").read_bytes()
    told = _run(trained, "train", *SMALL, "optimiser.cycles=[4]", "output=run", override, ok=False)
    assert f"got another {other}; give the same task" in told
    assert len(told.strip().splitlines()) == 1
    assert (trained / "run" / "checkpoint.safetensors").read_bytes() == before


def test_calibration_writes_profile_schedules_and_pictures(trained: Path) -> None:
    assert (trained / "run" / "profiles" / "ddpm-10.zarr.zip").is_file()
    assert {path.name for path in (trained / "run" / "schedules" / "ddpm-10").iterdir()} == {
        "bac-s2.json",
        "bac-s3.json",
    }
    folder, results = _results(trained, "calibrate")
    assert {"similarity.png", "sensitivity.png", "schedule.png"} <= {path.name for path in folder.iterdir()}
    assert results["observations"] == 4
    assert len(results["sensitivity"]) == 10


@pytest.mark.parametrize("cache", ["late", "bac_weighted"])
def test_evaluation_makes_schedules_from_the_profile(trained: Path, cache: str) -> None:
    results = _evaluate(trained, f"cache={cache}", "cache.updates=3", "video=0")
    assert results["schedule"]["method"] == cache
    assert results["action_error"]["mean"] > 0


def test_search_is_calibrated_before_it_is_evaluated(trained: Path) -> None:
    half = ["cache=search", "cache.gflops=0.02", "cache.trials=12"]
    told = _run(trained, "eval", *half, ok=False)
    assert "run scripts/calibrate.py with the same cache=search" in told
    _run(trained, "calibrate", "checkpoint=run/checkpoint.safetensors", "trial_observations=3", *half)
    kept = trained / "run" / "schedules" / "ddpm-10" / "search-0.02g.json"
    assert kept.is_file()
    written = kept.stat().st_mtime_ns
    results = _evaluate(trained, *half, "video=0")
    assert kept.stat().st_mtime_ns == written
    assert results["gflops"]["cached"] <= 0.02
    assert results["schedule"]["parameters"]["trials"] == 12
    kept.unlink()


def test_router_is_trained_into_the_profile_and_stays_there(trained: Path) -> None:
    path = trained / "run" / "profiles" / "ddpm-10.zarr.zip"
    before = FeatureProfile.load(path)
    small = ["checkpoint=run/checkpoint.safetensors", "observations=4", "sensitivity_observations=2", "cache.updates=3"]
    told = _run(trained, "eval", "cache=harmonica", "sampler=ddim", "sampler.steps=16", ok=False)
    assert "run scripts/calibrate.py task=... cache=harmonica" in told
    router = ["cache=harmonica", "router_iterations=2", "router_observations=3"]
    _run(trained, "calibrate", *small, *router, "reuse=true")
    folder, results = _results(trained, "calibrate")
    assert (folder / "gates.png").is_file()
    assert results["schedules"]["harmonica-s3"]["block_updates"] >= 3 * 6
    after = FeatureProfile.load(path)
    assert np.array_equal(after.sensitivity, before.sensitivity)
    assert after.gates.shape == (6, 10)
    results = _evaluate(trained, "cache=harmonica", "cache.updates=3", "video=0")
    assert results["schedule"]["method"] == "harmonica"
    _run(trained, "calibrate", *small, "cache=bac", "reuse=true")
    assert np.array_equal(FeatureProfile.load(path).gates, after.gates)
    _run(trained, "calibrate", *small, "cache=bac")
    assert FeatureProfile.load(path).gates is None


def test_evaluation_results_carry_what_they_must(trained: Path) -> None:
    results = _evaluate(trained, "cache=bac", "cache.updates=3", "compare=none", "video=1")
    for key in ("score", "success"):
        assert results[key]["low"] <= results[key]["mean"] <= results[key]["high"]
    assert (results["episodes"], results["seed"], len(results["scores"])) == (2, 100_000, 2)
    for side in ("cached", "uncached"):
        assert 0 < results["latency_ms"][side]["p50"] <= results["latency_ms"][side]["p99"]
    assert results["speedup"] == results["latency_ms"]["uncached"]["p50"] / results["latency_ms"]["cached"]["p50"]
    assert results["gflops"]["cached"] < results["gflops"]["uncached"]
    assert 0 < results["action_error"]["mean"] <= results["action_error"]["p95"]
    assert results["executor"] == {"kind": "compiled", "weights": "fp32", "because": None}
    assert results["schedule"]["method"] == "bac"
    assert results["schedule"]["parameters"]["updates"] == 3
    assert len(results["schedule"]["digest"]) == 64
    assert set(results["provenance"]) == {
        "commit", "command", "device", "threads", "dtype", "python", "versions", "config",
    }  # fmt: skip
    assert results["compare"]["score_difference"]["low"] <= results["compare"]["score_difference"]["high"]
    folder, _ = _results(trained, "eval")
    assert {"episode_100000.mp4", "schedule.png", "schedule.txt"} <= {path.name for path in folder.iterdir()}


def test_uncached_policy_that_onnx_cannot_hold_is_run_by_another_executor(tmp_path: Path) -> None:
    small = ["episodes=1", "task.max_steps=8", "latency_calls=1", "error_observations=2", "threads=1", "video=0"]
    told = _run(tmp_path, "eval", "task=push_t", "cache=bac", "cache.updates=5", "executor=onnx", *small)
    results = _results(tmp_path, "eval")[1]
    assert results["executor"] == {"kind": "onnx", "weights": "fp32", "because": None}
    assert results["uncached_executor"] == {"kind": "compiled", "weights": "fp32", "because": None}
    assert "push_t, bac, onnx fp32" in told
    assert "uncached, compiled" in told


def test_uncached_policy_that_onnx_holds_is_run_by_it_too(trained: Path) -> None:
    results = _evaluate(trained, "cache=bac", "cache.updates=3", "executor=onnx", "video=0")
    assert results["executor"] == results["uncached_executor"] == {"kind": "onnx", "weights": "fp32", "because": None}


def test_bank_that_onnx_cannot_hold_refuses_before_anything_is_made(tmp_path: Path) -> None:
    told = _run(tmp_path, "calibrate", "task=push_t", "bank=true", "executor=onnx", "demonstrations=none", ok=False)
    assert told == (
        "error: schedule bank: expected an executor that holds the uncached policy, 100 steps of all blocks, got onnx; "
        "use executor=compiled, or a sampler of fewer steps.\n"
    )


def test_evaluation_repeats_itself_and_none_is_the_reference(trained: Path) -> None:
    first, second = (_evaluate(trained, "cache=uniform", "cache.updates=2", "video=0") for _ in range(2))
    assert first["scores"] == second["scores"]
    assert first["schedule"] == second["schedule"]
    uncached = _evaluate(trained, "cache=none", "compare=none", "video=0")
    assert uncached["action_error"] == {"mean": 0, "p95": 0}
    assert uncached["compare"]["score_difference"] == {"mean": 0, "low": 0, "high": 0}


def test_benchmark_times_every_kind_of_row(trained: Path) -> None:
    small = ["networks=[checkpoint]", "batches=[1,2]", "reference_ddim=[5]", "updates=[3]", "ddim_updates=[[5,2]]"]
    few = ["calls=2", "warmup=1", "error_observations=4", "stages_schedule=bac-s3", "memory=false"]
    kinds = "only=[eager,compiled,hooks,DDIM]"
    _run(
        trained,
        "bench",
        "checkpoint=run/checkpoint.safetensors",
        *small,
        *few,
        kinds,
        "executors=[eager,compiled bf16]",
    )
    folder, results = _results(trained, "bench")
    assert {"table.md", "latency.png"} <= {path.name for path in folder.iterdir()}
    assert [table["batch"] for table in results["tables"]] == [1, 2]
    rows = {row["row"]: row for row in results["tables"][0]["rows"]}
    assert list(rows) == [
        "reference",
        "reference, DDIM-5",
        "hooks, uniform S=10",
        "hooks, BAC S=3",
        *(f"{kind}, {name}" for kind in ("eager", "compiled bf16") for name in ("full", "uniform S=10", "BAC S=3")),
        "compiled, DDIM-5 full",
        "compiled, DDIM-5 BAC S=2",
    ]
    assert rows["reference"]["ratio"] == 1
    assert rows["eager, full"]["action_error"] == 0
    assert 0 < rows["compiled bf16, full"]["action_error"] < rows["eager, BAC S=3"]["action_error"]
    assert rows["eager, BAC S=3"]["gflops"] < rows["eager, full"]["gflops"]
    stages = results["stages"]["latency_ms"]
    assert list(stages) == ["observation encoding", "noise", "denoising", "post-processing", "total"]
    assert all(row["memory"] is None and row["calls"] == 2 for row in rows.values())
    starts = results["starts"]
    assert set(starts) == {"compiled fp32", "compiled bf16"}
    assert all(start["ratio"] == start["first_s"] / start["second_s"] for start in starts.values())


def test_growth_has_a_point_per_value_and_executor(trained: Path) -> None:
    axes = ["growth.updates=[2,5]", "growth.steps=[5]", "growth.layers=[1]", "growth.widths=[64]"]
    _run(trained, "bench", "study=growth", *axes, "executors=[eager,compiled bf16]", "calls=1", "warmup=1")
    folder, results = _results(trained, "bench")
    assert {"growth.md", "growth.png"} <= {path.name for path in folder.iterdir()}
    points = [(row["axis"], row["value"], row["executor"]) for row in results["points"]]
    axes_and_values = [("updates S", 2), ("updates S", 5), ("steps K", 5), ("layers", 1), ("width d", 64)]
    assert points == [(*point, kind) for point in axes_and_values for kind in ("eager", "compiled bf16")]
    floors = {(row["axis"], row["value"], row["executor"]): row["floor"] for row in results["points"]}
    assert 0 < floors["updates S", 2, "eager"] < floors["updates S", 5, "eager"]
    assert 0 < floors["width d", 64, "eager"] < floors["layers", 1, "eager"]


def test_attempts_are_timed_against_the_reference(trained: Path) -> None:
    few = ["calls=1", "warmup=1", "updates=[3]", "only=[branches,eager]"]
    _run(trained, "bench", "study=tried", "checkpoint=run/checkpoint.safetensors", *few)
    folder, results = _results(trained, "bench")
    assert (folder / "tried.md").exists()
    schedules = ("full", "uniform S=10", "BAC S=3")
    assert [row["row"] for row in results["rows"]] == [
        "reference",
        *(f"branches by torch.compile, {name}" for name in schedules),
        *(f"eager, {name}" for name in schedules),
    ]


def _digest(trained: Path, cache: str, updates: int) -> str:
    _evaluate(trained, f"cache={cache}", f"cache.updates={updates}", "video=0")
    digest: str = _results(trained, "eval")[1]["schedule"]["digest"]
    return digest


def test_pareto_judges_and_plays_each_schedule_once(trained: Path) -> None:
    common = ["study=pareto", "checkpoint=run/checkpoint.safetensors", "calls=1", "error_observations=4"]
    common += ["pareto.equal_gflops=0.03"]
    chosen = ["pareto.methods=[uniform,late]", "pareto.free_last_step=[uniform]", "pareto.kept=kept.json"]
    episodes = ["pareto.episodes=2", "task.max_steps=8", "pareto.headline=[uniform-s2-free]"]
    _run(trained, "bench", *common, *chosen, *episodes, "pareto.updates=[2]")
    kept = json.loads((trained / "kept.json").read_text())
    assert all(0 < row["error"] <= row["error_p95"] for row in kept.values() if row.get("error"))
    marked = {key: row | ({"error": 0.125} if row.get("error") else {}) for key, row in kept.items()}
    marked |= {key: row | {"scores": [0.5, 0.75]} for key, row in kept.items() if "scores" in row}
    (trained / "kept.json").write_text(json.dumps(marked))
    _run(trained, "bench", *common, *chosen, *episodes, "pareto.updates=[2,10]")
    folder, results = _results(trained, "bench")
    assert {"pareto.md", "pareto.png", "scores.png"} <= {path.name for path in folder.iterdir()}
    rows = {row["label"]: row for row in results["rows"]}
    assert list(rows) == [
        "none", "uniform-s2", "uniform-s10", "late-s2", "late-s10", "uniform-s2-free", "uniform-s10-free",
    ]  # fmt: skip
    # All ten steps updated is no caching at all, and one schedule, whatever the method.
    for label in ("none", "uniform-s10", "late-s10", "uniform-s10-free"):
        assert rows[label]["error"] == rows[label]["feature_error"] == 0
    # What was judged and played before the second run was not judged and played again.
    assert rows["uniform-s2"]["error"] == rows["late-s2"]["error"] == rows["uniform-s2-free"]["error"] == 0.125
    assert rows["none"]["scores"] == rows["uniform-s2-free"]["scores"] == [0.5, 0.75]
    assert rows["uniform-s2-free"]["score_difference"] == {"mean": 0, "low": 0, "high": 0}
    # What an evaluation has played on the same episodes is taken from there.
    run = {"seed": 100_000, "scores": [0.25, 0.5, 1.0], "schedule": {"digest": _digest(trained, "late", 2)}}
    run |= {"executor": {"weights": "fp32"}, "provenance": {"config": {"task": {"max_steps": 8}}}}
    (trained / "late2.json").write_text(json.dumps(run))
    _run(trained, "bench", *common, *chosen, *episodes, "pareto.updates=[2]", "pareto.evaluated=[late2.json]")
    late = {row["label"]: row for row in _results(trained, "bench")[1]["rows"]}["late-s2"]
    assert (late["scores"], late["score"]["mean"]) == ([0.25, 0.5], 0.375)
    assert rows["uniform-s2"]["feature_error"] == pytest.approx(
        sum(rows["uniform-s2"]["feature_error_by_step"]) / 10, abs=1e-5
    )
    assert 0 < rows["uniform-s2"]["feature_error"] < 10


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("pareto.methods=[magic]", "error: method: expected one of "),
        ("pareto.headline=[bac-s77]", "error: pareto.headline: expected some of "),
    ],
)
def test_pareto_refuses_before_it_judges(trained: Path, override: str, told: str) -> None:
    common = ["study=pareto", "checkpoint=run/checkpoint.safetensors", "pareto.methods=[uniform]"]
    common += ["pareto.updates=[2]", "pareto.free_last_step=[]", "pareto.headline=[uniform-s2]"]
    said = _run(trained, "bench", *common, override, ok=False)
    assert told in said
    assert "judge" not in said


def test_peers_stand_beside_ours(trained: Path) -> None:
    few = ["calls=1", "warmup=1", "error_observations=2", "only=[MagCache,BAC,bac_weighted]"]
    values = ["peers.magcache=[0,9]", "peers.calibration_observations=2"]
    common = ["study=peers", "checkpoint=run/checkpoint.safetensors"]
    _run(trained, "bench", *common, *few, *values)
    folder, results = _results(trained, "bench")
    rows = {row["row"]: row for row in results["rows"]}
    assert list(rows) == [
        "reference",
        "diffusers MagCache 0",
        "diffusers MagCache 9",
        "hooks, BAC S=10",
        "compiled, BAC S=10",
        "compiled, bac_weighted S=10",
    ]
    assert all(f"| {name} |" in (folder / "peers.md").read_text() for name in rows)
    assert rows["reference"]["error"] == rows["diffusers MagCache 0"]["error"] == 0
    cached = rows["diffusers MagCache 9"]
    assert cached["computed"] < 1 == rows["reference"]["computed"]
    assert 0 < cached["error"] <= cached["error_p95"]
    assert results["refused"] == {}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("networks=[kitchn]", "error: networks: expected checkpoint, kitchen or both, got ['kitchn']"),
        (
            "study=speed",
            "error: study: expected one of latency, growth, tried, pareto, peers, realtime, wallclock, evaluated, "
            "got speed",
        ),
        ("batches=[0]", "error: batches: expected batch sizes of at least 1, got [0]"),
        ("ddim_updates=[[5]]", "error: ddim_updates: expected pairs, got [[5]]"),
        ("stages_schedule=bac-s9", "error: schedule: expected a file or one of ['bac-s2', 'bac-s3'"),
    ],
)
def test_benchmark_refuses_before_it_times(trained: Path, override: str, told: str) -> None:
    said = _run(trained, "bench", "checkpoint=run/checkpoint.safetensors", override, ok=False)
    assert told in said
    assert "build" not in said


def test_export_writes_a_graph_that_agrees(trained: Path) -> None:
    told = _run(trained, "export", "checkpoint=run/checkpoint.safetensors", "cache.updates=3")
    folder, results = _results(trained, "export")
    assert f"wrote {folder / 'chunk.onnx'}" in told
    assert 0 <= results["error"] <= 1e-4
    assert (folder / "chunk.onnx").stat().st_size == results["bytes"]


def test_sweep_ends_with_one_table(trained: Path) -> None:
    common = ["checkpoint=run/checkpoint.safetensors", "episodes=1", "task.max_steps=4", "latency_calls=1", "video=0"]
    told = _run(trained, "eval", "-m", *common, "error_observations=1", "cache.updates=2,3")
    assert told.count("cache.updates=2") >= 1
    sweep = max((trained / "outputs" / "eval-sweep").iterdir())
    summary = json.loads((sweep / "summary.json").read_text())
    assert [row["overrides"].split()[-1] for row in summary] == ["cache.updates=2", "cache.updates=3"]


def test_comparison_pairs_runs_of_the_same_episodes(trained: Path, tmp_path: Path) -> None:
    _evaluate(trained, "cache=none", "video=0")
    reference = _results(trained, "eval")[0]
    _evaluate(trained, "cache=bac", "cache.updates=3", "video=0")
    run, evaluation = _results(trained, "eval")
    (run / "results.json").write_text(json.dumps(evaluation | {"score": {"mean": 0.5, "low": 0.5, "high": 0.5}}))
    told = _run(trained, "compare", f"reference={reference}", f"runs=[{run}]")
    assert "| bac S=3 n=5 |" in told
    folder, results = _results(trained, "compare")
    assert results["rows"][0]["score_difference"] == {"mean": 0, "low": 0, "high": 0}
    assert results["rows"][1]["score"] == asdict(mean_estimate(evaluation["scores"]))
    assert {"table.md", "tradeoff.png"} <= {path.name for path in folder.iterdir()}
    _evaluate(trained, "cache=bac", "cache.updates=3", "video=0", "seed=5")
    other = _results(trained, "eval")[0]
    told = _run(trained, "compare", f"reference={reference}", f"runs=[{other}]", ok=False)
    assert told.startswith("error: first seed and episodes: expected")


def test_evaluated_schedules_are_made_again_and_timed_under_every_executor(trained: Path) -> None:
    settings = (["cache=none"], ["cache=none", "sampler=ddim", "sampler.steps=4"], ["cache=bac", "cache.updates=3"])
    folders = []
    for each in settings:
        evaluation = _evaluate(trained, *each, "video=0")
        folders.append(_results(trained, "eval")[0])
    path = folders[2] / "results.json"
    # Scores are what counts: the interval of an old evaluation may be of another kind.
    path.write_text(json.dumps(evaluation | {"score": {"mean": 0.5, "low": 0.5, "high": 0.5}}))
    common = ["study=evaluated", "checkpoint=run/checkpoint.safetensors", "calls=3", "warmup=1"]
    executors = "executors=[eager,onnx]"
    _run(trained, "bench", *common, executors, f"evaluated=[{','.join(map(str, folders))}]")
    folder, results = _results(trained, "bench")
    rows = {row["run"]: row for row in results["rows"]}
    assert list(rows) == ["none", "none on ddim-4 trailing", "bac S=3 n=5"]
    cached = rows["bac S=3 n=5"]
    assert rows["none"]["success_difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert cached["success_difference"]["low"] < cached["success_difference"]["high"]
    assert cached["gflops"] == evaluation["gflops"]["cached"] < rows["none"]["gflops"]
    assert (cached["score"], cached["success"]) == (
        asdict(mean_estimate(evaluation["scores"])),
        evaluation["success"],
    )
    assert cached["latency_ms"].keys() == {"eager", "onnx"}
    assert rows["none"]["score_difference"] == {"mean": 0, "low": 0, "high": 0}
    assert all(f"| {name} | {row['gflops']:.2f} |" in (folder / "table.md").read_text() for name, row in rows.items())
    document = json.loads(path.read_text())
    document["schedule"]["digest"] = rows["none"]["run"] * 16
    path.write_text(json.dumps(document))
    told = _run(trained, "bench", *common, executors, f"evaluated=[{folders[2]}]", ok=False)
    assert told.startswith("error: schedule bac S=3 n=5: expected digest nonenonenone as it was evaluated, got")
    told = _run(trained, "bench", *common, ok=False)
    assert told.startswith("error: evaluated: expected results of scripts/eval.py, got none")


def test_results_outlive_pictures_that_cannot_be_drawn(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "schedule.png").mkdir()
    small = ["checkpoint=run/checkpoint.safetensors", "episodes=1", "task.max_steps=4", "latency_calls=1", "video=1"]
    _run(trained, "eval", *small, "error_observations=1", "cache=none", f"hydra.run.dir={tmp_path}", ok=False)
    assert json.loads((tmp_path / "results.json").read_text())["episodes"] == 1


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["cache.updates=11"], "error: cache.updates: expected 1 to 10, got 11"),
        (["cache.updates=0"], "error: cache.updates: expected 1 to 10, got 0"),
        (["cache.updates=3", "cache.upstream_blocks=7"], "error: cache.upstream_blocks: expected 0 to 6, got 7"),
        (["checkpoint=null", "sampler=ddim", "sampler.steps=5"], "error: feature profile: expected a file"),
        (["task=lift"], "error: policy for task=lift: expected task lift, got push_t; give task=push_t"),
        (["weights=ema"], "error: weights: expected null for a checkpoint of ours"),
        (["checkpoint=nowhere.safetensors"], "error: checkpoint: expected a file"),
        (
            ["task=push_t_image", "checkpoint=null"],
            "error: checkpoint: expected a file, or a task of the shipped ['can', 'lift', 'push_t', 'square'], got "
            "push_t_image; give checkpoint=PATH of one that you trained.",
        ),
        (["checkpoint=run"], "got run; give checkpoint=run/checkpoint.safetensors."),
        (["compare=ddim"], "error: compare: expected none"),
        (["cache=none", "error_observations=99999999"], "error: observations: expected 1 to 25650, got 99999999"),
        (["cache.updatez=3"], "cache.updatez"),
    ],
)
def test_bad_input_refuses_before_any_episode(trained: Path, overrides: list[str], told: str) -> None:
    said = _run(trained, "eval", "checkpoint=run/checkpoint.safetensors", *overrides, ok=False)
    assert told in said
    assert "play" not in said
