"""Score against latency: each method under each seam rule, and where it stands on this machine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import bac
from bac.acceleration import select_for
from bac.choices import choice
from bac.control import Fallback, LoopSettings, Seam, ticks_for
from bac.control.latency_budget import FEWEST_CALLS
from bac.errors import InvalidInput, sentence
from bac.executors import Selection
from bac.files import write_whole
from bac.methods import NoCache
from bac.pictures import save_figure
from bac.results import device_name, run_provenance, write_results
from bac.schedule import CacheSchedule
from bac.statistics import Estimate, paired_difference
from configs.controls import hold_of
from configs.methods import default_method
from configs.studies import BenchConfig
from configs.tasks import environment, loop_rate, require_environment, require_task
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
    "action age mean ms",
    "seam jump",
)


def run(config: BenchConfig, folder: Path) -> None:
    """Time every row, play every row, seam and latency on the same seeds and noise; write table, plot and JSON.

    What was played is kept in ``config.realtime.kept`` after each point: a killed study goes on from it. Measured
    latencies are kept too, so that its points stay what they were.
    """
    study, seams = config.realtime, _require(config)
    kept = Kept(Path(study.kept))
    rows = {name: _row(config, name) for name in study.rows}
    traces = _traces(config, kept, rows, Seam.INPAINT in seams)
    points = []
    grid = [(name, seam, latency) for name in rows for seam in seams for latency in [*study.latencies_ms, MEASURED]]
    for name, seam, latency in tqdm(grid, desc="play", unit="point"):
        # Without latency nothing is committed while a chunk is denoised, and inpainting is replacing.
        played_as = Seam.REPLACE if (seam, latency) == (Seam.INPAINT, 0.0) else seam
        key = point_key(config, rows[name], played_as, latency, traces[name]["key"])
        trace = traces[name]["ms"] if latency == MEASURED else [float(latency)]
        told = kept.get(key, partial(_played, config, rows[name].policy, played_as, trace))
        points.append({"row": name, "seam": str(seam), "latency": latency, "p99_ms": p99(trace), **told})
    _compare(points)
    results = {
        "points": points,
        "traces": traces,
        "executors": {name: row.executor.to_json() for name, row in rows.items()},
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    text = markdown_table(_COLUMNS, map(_cells, points))
    write_whole(folder / "realtime.md", lambda path: path.write_text(text))
    save_figure(_plot(points), folder / "realtime.png")
    write_results(folder / "results.json", results)
    print(f"{text}\nresults in {folder}")


def _require(config: BenchConfig) -> list[Seam]:
    """Return the seams; refuse what would be missed only after something was timed or played."""
    study = config.realtime
    seams = [choice("realtime.seams", name, Seam) for name in study.seams]
    fine = 0.0 in study.latencies_ms and all(0 <= each < float("inf") for each in study.latencies_ms)
    if not (fine and seams and study.rows):
        got = f"{study.rows}, {study.seams} and {study.latencies_ms}"
        expected = "rows, seams, and latencies of at least 0 ms with 0 among them"
        raise InvalidInput(sentence("realtime", expected=expected, got=got, mend="correct the override"))
    for name, least in {"episodes": 1, "parallel": 1, "calls": FEWEST_CALLS}.items():
        if (given := getattr(study, name)) < least:
            raise InvalidInput(
                sentence(f"realtime.{name}", expected=f"at least {least}", got=given, mend="correct the override")
            )
    loop_rate(config.task, None)
    require_environment(config.task, draws=False)
    return seams


@dataclass(frozen=True)
class Row:
    """A method of the study: what plays, by which schedule, and what runs it."""

    policy: DiffusionPolicy
    schedule: CacheSchedule
    executor: Selection

    @property
    def digest(self) -> str:
        """What it computes: checkpoint and sampler are in the schedule's digest."""
        return f"{self.schedule.digest}|{self.executor.kind} {self.executor.weights}"


def _row(config: BenchConfig, name: str) -> Row:
    """Return what a row plays: ``none``, ``none ddim-10``, ``bac 10`` (a name of ``cache=`` and its updates)."""
    method, _, rest = name.partition(" ")
    short = rest.removeprefix("ddim-") if rest.startswith("ddim-") else ""
    chosen = default_method(method)
    updates = rest.isdigit() and not isinstance(chosen, NoCache)
    if rest and not updates and not short.isdigit():
        raise InvalidInput(
            sentence("realtime.rows", expected="'none', 'none ddim-10' or 'bac 10'", got=name, mend="correct it")
        )
    policy = load_policy(config.checkpoint or config.task.name, device=config.device)
    require_task(config.task, policy.spec)
    if short:
        policy = DiffusionPolicy(policy.checkpoint, ddim(policy.spec.process, int(short)), artefacts=policy.artefacts)
    schedule = make_schedule(chosen.with_budget(int(rest)) if updates else chosen, policy)
    executor = select_for(schedule, policy.trunk)
    fast = bac.accelerate(policy, schedule, executor)
    require_standing_alone(fast)
    return Row(fast, schedule, executor)


def _traces(config: BenchConfig, kept: Kept, rows: Mapping[str, Row], inpaint: bool) -> dict[str, dict[str, Any]]:
    """Return each row's latencies: those that are kept, and the others timed now, all of them in turn.

    One trace serves all seams of a row, around committed actions if one of them commits any: at two traces, the
    machine's moods would be compared and not the seams.
    """
    seam = Seam.INPAINT if inpaint else Seam.REPLACE
    keys = {name: trace_key(config, row, inpaint) for name, row in rows.items()}
    missing = {
        name: (row.policy, partial(_settings, config, row.policy, seam))
        for name, row in rows.items()
        if keys[name] not in kept
    }
    timed = measured_for(missing, config.realtime.calls) if missing else {}
    for name, taken_ms in timed.items():
        kept.put(keys[name], {"ms": taken_ms, **_origin(config)})
    return {name: kept[key] | {"key": key} for name, key in keys.items()}


def trace_key(config: BenchConfig, row: Row, inpaint: bool) -> str:
    """Return the name under which latencies are kept: what was timed, how, and on what."""
    how = f"{config.realtime.calls} calls on {device_name(torch.device(config.device))}, {config.threads} thread(s)"
    around = "|around committed actions" if inpaint else ""
    return f"{row.digest}|{MEASURED}|{how}, torch {torch.__version__}{around}"


def point_key(config: BenchConfig, row: Row, seam: Seam, latency: float | str, timed: str) -> str:
    """Return the name under which a point is kept: what played, at which latency, under which seam, and what.

    Args:
        config: of the study.
        row: what played.
        seam: how chunks met.
        latency: milliseconds, or ``measured``.
        timed: the name of the row's latencies.
    """
    taken = timed if latency == MEASURED else f"{row.digest}|{latency}"
    task, episodes = config.task, config.realtime.episodes
    played = f"{task.name}, a chunk every {row.policy.action_steps} of at most {task.max_steps} steps"
    return f"{taken}|{seam}|{played}, {episodes} episodes from {task.seed}"


def _played(config: BenchConfig, policy: DiffusionPolicy, seam: Seam, trace: list[float]) -> dict[str, Any]:
    settings = _settings(config, policy, seam, p99(trace))
    source = ChunkSource([policy])
    world = World(environment(config.task), source, settings, config.task.max_steps, hold_of(config.task))
    seeds = range(config.task.seed, config.task.seed + config.realtime.episodes)
    latency: LatencyOf = drawn_from(trace)
    played = play_virtual(world, seeds, latency, parallel=config.realtime.parallel)
    return {**scores([each.episode for each in played]), **summary(played), **_origin(config)}


def _origin(config: BenchConfig) -> dict[str, Any]:
    """Return where something that is kept comes from: a study that goes on may be another commit's."""
    provenance = run_provenance(torch.device(config.device), {})
    return {"origin": {name: provenance[name] for name in ("commit", "device", "threads", "versions")}}


def _settings(config: BenchConfig, policy: DiffusionPolicy, seam: Seam, p99_ms: float) -> LoopSettings:
    return LoopSettings(
        rate_hz=config.task.rate_hz,
        replan_ticks=policy.action_steps,
        deadline_ticks=ticks_for(p99_ms, config.task.rate_hz),
        seam=seam,
        fallback=Fallback.HOLD,
        rest_age_ms=math.inf,  # only the robot moves things in a simulator
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
        f"{point['action_age_ms'].get('mean', 0):.0f}",
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
