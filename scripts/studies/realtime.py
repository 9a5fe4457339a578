"""Score against latency: each method under each seam rule, and where it stands on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
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
from bac.schedule import CacheSchedule
from bac.statistics import Estimate, paired_difference
from configs.controls import hold_of
from configs.methods import default_method
from configs.studies import BenchConfig
from configs.tasks import environment, loop_rate
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, make_schedule
from policies.realtime import ChunkSource, require_standing_alone
from policies.samplers import ddim
from studies.episodes import scores
from studies.kept import Kept
from studies.realtime_episodes import LatencyOf, World, play_virtual
from studies.realtime_play import MEASURED, drawn_from, measured_for, p99, summary
from studies.rows import markdown_table

_COLUMNS = (
    "method",
    "seam",
    "latency ms",
    "score",
    "against no latency",
    "against the first row",
    "held ticks",
    "action age p99 ms",
    "seam jump",
)


def run(config: BenchConfig, folder: Path) -> None:
    """Time every row, play every row, seam and latency on the same seeds and noise; write table, plot and JSON.

    What was played is kept in ``config.realtime.kept`` after each point: a killed study goes on from it. Measured
    latencies are kept too, so that its points stay what they were.
    """
    study = config.realtime
    seams = [choice("realtime.seams", name, Seam) for name in study.seams]
    if not study.latencies_ms or 0.0 not in study.latencies_ms or not seams:
        got = f"{study.latencies_ms} and {study.seams}"
        raise InvalidInput(
            sentence(
                "realtime", expected="seams, and latencies with 0 among them", got=got, mend="correct the override"
            )
        )
    loop_rate(config.task, None)
    kept = Kept(Path(study.kept))
    rows = {name: _row(config, name) for name in study.rows}
    policies = {name: policy for name, (policy, _) in rows.items()}
    digests = {name: schedule.digest for name, (_, schedule) in rows.items()}
    timed = [(name, seam) for name in policies for seam in seams]
    traces = {
        (name, seam): kept.get(
            trace_key(config, digests[name], seam),
            partial(measured_for, policies[name], partial(_settings, config, policies[name], seam), study.calls),
        )
        for name, seam in tqdm(timed, desc="time", unit="row")
    }
    points = []
    grid = [(name, seam, latency) for name in policies for seam in seams for latency in [*study.latencies_ms, MEASURED]]
    for name, seam, latency in tqdm(grid, desc="play", unit="point"):
        # Without latency nothing is committed while a chunk is denoised, and inpainting is replacing.
        played_as = Seam.REPLACE if (seam, latency) == (Seam.INPAINT, 0.0) else seam
        key = point_key(config, digests[name], played_as, latency)
        trace = traces[name, seam] if latency == MEASURED else [float(latency)]
        told = kept.get(key, partial(_played, config, policies[name], played_as, trace))
        points.append({"row": name, "seam": str(seam), "latency": latency, "p99_ms": p99(trace), **told})
    _compare(points)
    results = {
        "points": points,
        "traces_ms": {name: {str(seam): traces[name, seam] for seam in seams} for name in policies},
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    text = markdown_table(_COLUMNS, map(_cells, points))
    write_whole(folder / "realtime.md", lambda path: path.write_text(text))
    save_figure(_plot(points), folder / "realtime.png")
    write_results(folder / "results.json", results)
    print(f"{text}\nresults in {folder}")


def _row(config: BenchConfig, name: str) -> tuple[DiffusionPolicy, CacheSchedule]:
    """Return what a row plays: ``none``, ``none ddim-10``, ``bac 10`` (a name of ``cache=`` and its updates)."""
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
    schedule = make_schedule(chosen, policy)
    fast = bac.accelerate(policy, schedule, ExecutorKind.AUTO)
    require_standing_alone(fast)
    return fast, schedule


def trace_key(config: BenchConfig, digest: str, seam: Seam) -> str:
    """Return the name under which latencies are kept: schedule (and with it checkpoint and sampler), how measured.

    Of the seams only ``inpaint`` gives a chunk more to do.
    """
    how = f"{config.realtime.calls} calls on {config.device}, {config.threads} thread(s)"
    return f"{digest}|{MEASURED}|{how}" + ("|around committed actions" if seam is Seam.INPAINT else "")


def point_key(config: BenchConfig, digest: str, seam: Seam, latency: float | str) -> str:
    """Return the name under which a point is kept: schedule, latency, seam and episodes."""
    taken = trace_key(config, digest, seam) if latency == MEASURED else f"{digest}|{latency}"
    task, episodes = config.task, config.realtime.episodes
    return f"{taken}|{seam}|{episodes} episodes from {task.seed}, at most {task.max_steps} steps"


def _played(config: BenchConfig, policy: DiffusionPolicy, seam: Seam, trace: list[float]) -> dict[str, Any]:
    settings = _settings(config, policy, seam, p99(trace))
    source = ChunkSource([policy])
    world = World(environment(config.task), source, settings, config.task.max_steps, hold_of(config.task))
    seeds = range(config.task.seed, config.task.seed + config.realtime.episodes)
    latency: LatencyOf = drawn_from(trace)
    played = play_virtual(world, seeds, latency, parallel=config.realtime.parallel)
    return {**scores([each.episode for each in played]), **summary(played)}


def _settings(config: BenchConfig, policy: DiffusionPolicy, seam: Seam, p99_ms: float) -> LoopSettings:
    return LoopSettings(
        rate_hz=config.task.rate_hz,
        replan_ticks=policy.action_steps,
        deadline_ticks=ticks_for(p99_ms, config.task.rate_hz),
        seam=seam,
        fallback=Fallback.HOLD,
    )


def _compare(points: list[dict[str, Any]]) -> None:
    """Add to every point its paired differences: to its row and seam without latency, and to the first row's point.

    At ``measured`` each row is played at the latency that is its own.
    """
    first = points[0]["row"]
    still = {(each["row"], each["seam"]): each["scores"] for each in points if each["latency"] == 0.0}
    rival = {(each["seam"], each["latency"]): each["scores"] for each in points if each["row"] == first}
    for each in points:
        each["score_difference"] = asdict(paired_difference(each["scores"], still[each["row"], each["seam"]]))
        each["row_difference"] = asdict(paired_difference(each["scores"], rival[each["seam"], each["latency"]]))


def _cells(point: Mapping[str, Any]) -> tuple[str, ...]:
    measured = point["latency"] == MEASURED
    ticks = point["counters"]
    return (
        point["row"],
        point["seam"],
        f"measured, p99 {point['p99_ms']:.0f}" if measured else f"{point['latency']:g}",
        "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**point["score"]),
        Estimate(**point["score_difference"]).signed,
        Estimate(**point["row_difference"]).signed,
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
