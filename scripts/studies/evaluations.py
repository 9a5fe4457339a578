"""Results of ``scripts/eval.py``, read again: which episodes they are of, and what their schedule is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bac.errors import CorruptArtefact, Mismatch, MissingArtefact, sentence
from bac.executors import WeightType
from bac.results import read_results

RESULTS_FILE = "results.json"
_KEYS = frozenset({"scores", "seed", "schedule", "executor", "provenance"})


def read_evaluation(run: Path) -> dict[str, Any]:
    """Read results: their folder, or the JSON file.

    Raises:
        MissingArtefact: no such file.
        CorruptArtefact: not the results of an evaluation.
    """
    path = run if run.suffix == ".json" else run / RESULTS_FILE
    if not path.is_file():
        raise MissingArtefact(
            sentence(
                "evaluation",
                expected=f"a file {path}",
                got="none",
                mend="give what scripts/eval.py wrote, folder or JSON",
            )
        )
    results = read_results(path)
    if not results.keys() >= _KEYS:
        raise CorruptArtefact(
            sentence(str(path), expected="results of scripts/eval.py", got=sorted(results), mend="give its folder")
        )
    return results


def require_same_episodes(reference: dict[str, Any], run: dict[str, Any]) -> None:
    """Refuse to pair evaluations of other episodes, longer or shorter ones, or another policy.

    Raises:
        Mismatch: they are.
    """
    checks: dict[str, Callable[[dict[str, Any]], object]] = {
        "first seed and episodes": lambda results: (results["seed"], results["episodes"]),
        "checkpoint": lambda results: results["schedule"]["checkpoint"],
        "longest episode, control steps": lambda results: results["provenance"]["config"]["task"]["max_steps"],
    }
    for what, of in checks.items():
        if of(reference) != of(run):
            raise Mismatch(
                sentence(
                    what, expected=of(reference), got=of(run), mend="evaluate both on the same episodes and policy"
                )
            )


def successes(results: Mapping[str, Any]) -> list[bool]:
    """Return which episodes succeeded: those of the full score 1, as on every task here.

    Raises:
        Mismatch: these are not as many as the results say.
    """
    full = [score >= 1 for score in results["scores"]]
    if not math.isclose(sum(full) / len(full), results["success"]["mean"]):
        raise Mismatch(
            sentence(
                "share of episodes with the full score",
                expected=f"{results['success']['mean']}, the success rate",
                got=sum(full) / len(full),
                mend="evaluate it again with this version",
            )
        )
    return full


def run_name(results: Mapping[str, Any]) -> str:
    """Return what tables call an evaluation: its schedule, and how it was played where that is not the usual way.

    Usual are float32 weights and a world that waits: ``bac S=10 n=5``, or ``bac S=10 n=5, bf16, realtime at 60 ms``.
    """
    parts = [schedule_name(results["schedule"])]
    weights = results["executor"]["weights"]
    parts += [weights] * (weights != WeightType.FP32)
    if "control" in results:
        configured = results["provenance"]["config"]
        latency, seam = configured["latency"], configured["control"]["seam"]
        taken = f"{latency:g} ms" if isinstance(latency, int | float) else "measured latency"
        parts.append(f"{results['control']['cached']['mode']} at {taken}, {seam}")
    return ", ".join(parts)


def schedule_name(schedule: dict[str, Any]) -> str:
    """Return what tables call the schedule and sampler of an evaluation, for instance ``bac S=10 n=5``."""
    parameters, sampler = schedule["parameters"], schedule["sampler"]
    parts = [schedule["method"]]
    shown = {"updates": "S={}", "power": "p={}", "gflops": "{} G", "upstream_blocks": "n={}"}
    if parameters.get("sharing") == "all":
        del shown["upstream_blocks"]  # nothing to widen
    parts += [text.format(parameters[name]) for name, text in shown.items() if name in parameters]
    if parameters.get("metric", "cosine") != "cosine":
        parts.append(parameters["metric"])
    # The second spelling is of results from before the option had its name.
    if parameters.get("last_step") == "free" or parameters.get("force_last_step") is False:
        parts.append("last step free")
    if sampler["name"] != "ddpm" or sampler["steps"] != sampler["train_steps"]:
        parts.append(f"on {sampler['name']}-{sampler['steps']} {sampler.get('spacing', '')}".strip())
    return " ".join(parts)
