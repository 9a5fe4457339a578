"""Score against latency: each method under each seam rule, and where it stands on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import bac
from bac.choices import choice
from bac.control import Fallback, LoopSettings, Seam, ticks_for
from bac.errors import InvalidInput, sentence
from bac.executors import ExecutorKind
from bac.files import write_whole
from bac.methods import NoCache
from bac.pictures import save_figure
from bac.results import run_provenance, write_results
from bac.statistics import paired_difference
from configs.controls import hold_of
from configs.methods import default_method
from configs.studies import BenchConfig
from configs.tasks import environment
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, make_schedule
from policies.realtime import ChunkSource
from policies.samplers import ddim
from studies.episodes import scores
from studies.realtime_episodes import LatencyOf, World, play_virtual
from studies.realtime_play import drawn_from, measured_ms, summary
from studies.rows import markdown_table

_COLUMNS = (
    "method",
    "seam",
    "latency ms",
    "score",
    "against no latency",
    "held ticks",
    "action age p99 ms",
    "seam jump",
)
MEASURED = "measured"


def run(config: BenchConfig, folder: Path) -> None:
    """Time every row, play every row, seam and latency on the same seeds and noise; write table, plot and JSON.

    What was played is kept in ``config.realtime.kept`` after each point: a killed study goes on from it. Measured
    latencies are kept too, so that its points stay what they were.
    """
    torch.set_num_threads(config.threads)
    study = config.realtime
    seams = [choice("realtime.seams", name, Seam) for name in study.seams]
    if not study.latencies_ms or 0.0 not in study.latencies_ms or not seams:
        got = f"{study.latencies_ms} and {study.seams}"
        raise InvalidInput(
            sentence(
                "realtime", expected="seams, and latencies with 0 among them", got=got, mend="correct the override"
            )
        )
    kept = _Kept(Path(study.kept))
    policies = {name: _policy(config, name) for name in study.rows}
    traces = {
        name: kept.get(_key(policy, name, "trace"), lambda each=policy: measured_ms(config.task, each, study.calls))
        for name, policy in tqdm(policies.items(), desc="time", unit="row")
    }
    points = []
    grid = [(name, seam, latency) for name in policies for seam in seams for latency in [*study.latencies_ms, MEASURED]]
    for name, seam, latency in tqdm(grid, desc="play", unit="point"):
        # Without latency nothing is committed while a chunk is denoised, and inpainting is replacing.
        played_as = Seam.REPLACE if (seam, latency) == (Seam.INPAINT, 0.0) else seam
        key = _key(policies[name], name, played_as, latency, study.episodes, config.task.max_steps)
        trace = traces[name] if latency == MEASURED else [float(latency)]
        told = kept.get(key, lambda n=name, s=played_as, t=trace: _played(config, policies[n], s, t))
        points.append({"row": name, "seam": str(seam), "latency": latency, "p99_ms": _p99(trace), **told})
    _against_no_latency(points)
    results = {
        "points": points,
        "traces_ms": traces,
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    text = markdown_table(_COLUMNS, map(_cells, points))
    write_whole(folder / "realtime.md", lambda path: path.write_text(text))
    save_figure(_plot(points), folder / "realtime.png")
    write_results(folder / "results.json", results)
    print(f"{text}\nresults in {folder}")


def _policy(config: BenchConfig, name: str) -> DiffusionPolicy:
    """Return a row's policy: ``none``, ``none ddim-10``, ``bac 10`` (a name of ``cache=`` and its updates)."""
    method, _, rest = name.partition(" ")
    short = rest.removeprefix("ddim-") if rest.startswith("ddim-") else ""
    if (rest and not short and not rest.isdigit()) or (short and not short.isdigit()):
        raise InvalidInput(
            sentence("realtime.rows", expected="'none', 'none ddim-10' or 'bac 10'", got=name, mend="correct it")
        )
    policy = load_policy(config.checkpoint or config.task.name, device=config.device)
    if short:
        policy = DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, int(short)), artefacts=policy.artefacts)
    chosen = default_method(method)
    chosen = chosen.with_budget(int(rest)) if rest.isdigit() and not isinstance(chosen, NoCache) else chosen
    return bac.accelerate(policy, make_schedule(chosen, policy), ExecutorKind.AUTO)


def _key(policy: DiffusionPolicy, *parts: object) -> str:
    """Return a name for what is kept, which a result of another checkpoint does not have."""
    return "|".join(map(str, (policy.checkpoint.digest[:12], *parts)))


def _played(config: BenchConfig, policy: DiffusionPolicy, seam: Seam, trace: list[float]) -> dict[str, Any]:
    settings = LoopSettings(
        rate_hz=config.task.rate_hz,
        replan_ticks=policy.action_steps,
        deadline_ticks=ticks_for(_p99(trace), config.task.rate_hz),
        seam=seam,
        fallback=Fallback.HOLD,
    )
    source = ChunkSource([policy])
    world = World(environment(config.task), source, settings, config.task.max_steps, hold_of(config.task))
    seeds = range(config.task.seed, config.task.seed + config.realtime.episodes)
    latency: LatencyOf = drawn_from(trace)
    played = play_virtual(world, seeds, latency, parallel=config.realtime.parallel)
    return {**scores([each.episode for each in played]), **summary(played)}


def _against_no_latency(points: list[dict[str, Any]]) -> None:
    """Add to every point its paired difference to the same row and seam without latency."""
    still = {(each["row"], each["seam"]): each["scores"] for each in points if each["latency"] == 0.0}
    for each in points:
        each["score_difference"] = asdict(paired_difference(each["scores"], still[each["row"], each["seam"]]))


def _p99(trace: list[float]) -> float:
    return float(np.percentile(trace, 99))


def _cells(point: Mapping[str, Any]) -> tuple[str, ...]:
    measured = point["latency"] == MEASURED
    ticks = point["counters"]
    return (
        point["row"],
        point["seam"],
        f"measured, p99 {point['p99_ms']:.0f}" if measured else f"{point['latency']:g}",
        "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**point["score"]),
        "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**point["score_difference"]),
        f"{ticks['held'] / max(ticks['ticks'], 1):.1%}",
        f"{point['action_age_ms'].get('p99', 0):.0f}",
        f"{point['seam_jump'].get('mean', float('nan')):.1f}",
    )


def _plot(points: list[dict[str, Any]]) -> Figure:
    seams = list(dict.fromkeys(each["seam"] for each in points))
    figure, axes = plt.subplots(
        1, len(seams), figsize=(5 * len(seams), 4), sharey=True, layout="constrained", squeeze=False
    )
    for axis, seam in zip(axes[0], seams, strict=True):
        for number, row in enumerate(dict.fromkeys(each["row"] for each in points)):
            own = [each for each in points if (each["row"], each["seam"]) == (row, seam)]
            line = sorted((each for each in own if each["latency"] != MEASURED), key=lambda each: each["latency"])
            here = next(each for each in own if each["latency"] == MEASURED)
            means = np.array([each["score"]["mean"] for each in line])
            spread = [means - [each["score"]["low"] for each in line], [each["score"]["high"] for each in line] - means]
            axis.errorbar([e["latency"] for e in line], means, spread, capsize=2, color=f"C{number}", label=row)
            axis.plot(here["p99_ms"], here["score"]["mean"], "*", markersize=13, color=f"C{number}")
        axis.set(xlabel="latency of a chunk, ms (star: this machine, p99)", title=seam)
    axes[0, 0].set_ylabel("score")
    axes[0, 0].legend(fontsize=8)
    return figure


class _Kept:
    """Results by name in a file that is written after each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, make: Any) -> Any:
        """Return what is kept under ``key``, or make and keep it."""
        if key not in self._known:
            self._known[key] = make()
            write_results(self._path, self._known)
        return self._known[key]
