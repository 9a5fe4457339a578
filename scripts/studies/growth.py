"""How the time of a chunk grows with updates S, steps K, depth and width, and how far it stays from the floor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from bac.errors import InvalidInput, sentence
from bac.executors import WeightType
from bac.files import write_whole
from bac.methods import Uniform
from bac.passes import optimise
from bac.pictures import plain_log_axis, save_figure
from bac.plan import lower
from bac.results import run_provenance, write_results
from bac.roofline import measure_roofline, plan_floor_s, weight_bytes
from configs.studies import BenchConfig
from policies.benchmark import executor_rows, quick_profile, random_policy
from policies.diffusion_transformer import DiffusionTransformerConfig
from studies.rows import markdown_table, started, timed

_BASE = DiffusionTransformerConfig(action_dim=2, observation_dim=20, horizon=16)
"""The Push-T network: 8 layers, 256 channels."""

_UPDATES, _STEPS = 10, 100
_COLUMNS = ("axis", "value", "executor", "p50 ms", "p99 ms", "floor ms", "p50 over floor")
_BYTES = {WeightType.FP32: 4, WeightType.BF16: 2}


@dataclass(frozen=True)
class _Point:
    """One network, sampler and uniform schedule."""

    axis: str
    value: int
    network: DiffusionTransformerConfig = _BASE
    steps: int = _STEPS
    updates: int = _UPDATES


def run(config: BenchConfig, folder: Path) -> None:
    """Time every point; write table, plot and JSON into ``folder``.

    Raises:
        InvalidInput: on another device than a CPU, which the floor is of.
    """
    if torch.device(config.device).type != "cpu":
        raise InvalidInput(
            sentence(
                "device of study=growth",
                expected="cpu, whose floor it measures",
                got=config.device,
                mend="time a GPU with study=latency",
            )
        )
    missing: dict[str, str] = {}
    results = [row for point in _points(config) for row in _measured(config, point, missing)]
    text = markdown_table(_COLUMNS, map(_cells, results))
    write_whole(folder / "growth.md", lambda path: path.write_text(text))
    save_figure(_plot(results), folder / "growth.png")
    provenance = run_provenance(torch.device(config.device), asdict(config))
    write_results(folder / "results.json", {"points": results, "unavailable": missing, "provenance": provenance})
    print(f"{text}\nresults in {folder}")


def _points(config: BenchConfig) -> Iterator[_Point]:
    """Yield the points, one axis at a time around the Push-T network with uniform S = 10 (or K), K = 100."""
    growth = config.growth
    yield from (_Point("updates S", value, updates=value) for value in growth.updates)
    yield from (_Point("steps K", value, steps=value, updates=min(value, _UPDATES)) for value in growth.steps)
    yield from (_Point("layers", value, network=replace(_BASE, layers=value)) for value in growth.layers)
    yield from (_Point("width d", value, network=replace(_BASE, width=value)) for value in growth.widths)


def _measured(config: BenchConfig, point: _Point, missing: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a row per executor; put into ``missing`` which of them this machine does not have, and why."""
    policy = random_policy(point.network, point.steps, device=config.device)
    observed = torch.zeros(1, policy.observation_steps, point.network.observation_dim, device=config.device)
    schedule = Uniform(point.updates).schedule(quick_profile(policy, observed))
    plan = optimise(lower(schedule))
    floors, rows = {}, []
    for kind, weights in config.chosen_executors():
        (row,) = executor_rows(policy, {"uniform": schedule}, kind, weights)
        read = weight_bytes(policy.trunk.decoder(), _BYTES[weights])
        floors[row.name] = plan_floor_s(plan, policy.trunk.cost, read, measure_roofline(sum(read)))
        rows.append(row)
    built, refused = started(rows, policy)
    missing.update({f"{name}, {point.axis} = {point.value}": reason for name, reason in refused.items()})
    latency = timed(config, policy, built, observed, f"{point.axis} = {point.value}")
    for name, each in latency.items():
        executor, floor = name.removesuffix(", uniform"), floors[name] * 1e3
        yield {"axis": point.axis, "value": point.value, "executor": executor, "floor": floor, **each.to_json()}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    times = f"{row['p50']:.1f}", f"{row['p99']:.1f}", f"{row['floor']:.1f}", f"{row['p50'] / row['floor']:.1f}"
    return (row["axis"], str(row["value"]), row["executor"], *times)


def _plot(results: list[dict[str, Any]]) -> Figure:
    axes_of = list(dict.fromkeys(row["axis"] for row in results))
    executors = list(dict.fromkeys(row["executor"] for row in results))
    figure, panels = plt.subplots(1, len(axes_of), figsize=(4 * len(axes_of), 4), layout="constrained", squeeze=False)
    for panel, axis in zip(panels[0], axes_of, strict=True):
        for number, executor in enumerate(executors):
            rows = [row for row in results if (row["axis"], row["executor"]) == (axis, executor)]
            values = [row["value"] for row in rows]
            panel.plot(values, [row["p50"] for row in rows], "o-", color=f"C{number}", label=executor)
            panel.plot(values, [row["floor"] for row in rows], ":", color=f"C{number}")
        panel.set(xlabel=axis, ylabel="ms per chunk, p50 (dotted: floor)")
        plain_log_axis(panel, "x")
        plain_log_axis(panel, "y")
    panels[0][0].legend(fontsize=8)
    return figure
