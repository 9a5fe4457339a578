"""Time one action chunk under every executor, schedule and sampler: ``python scripts/bench.py task=push_t``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import bac
from bac.choices import choice
from bac.errors import InvalidInput, Unavailable, sentence
from bac.executors import ChunkNoise, ExecutorKind, WeightType
from bac.files import write_whole
from bac.pictures import save_figure
from bac.profile import FeatureProfile
from bac.results import run_provenance, write_results
from bac.timing import device_synchroniser, measure_interleaved, measure_stages
from configs.entry import script
from configs.schema import BenchConfig
from configs.tasks import demonstrations
from policies.benchmark import (
    KITCHEN,
    Denoise,
    Row,
    StartedRow,
    ddim_rows,
    executor_rows,
    hook_rows,
    quick_profile,
    random_policy,
    schedules,
    start,
)
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer
from policies.loading import load_policy, locate_checkpoint, profile_path

REFERENCE = "reference"
_COLUMNS = ("row", "p50 ms", "p99 ms", "against reference", "GFLOPs", "action error", "start s")
_SEED = 1_000_003


def main(config: BenchConfig, folder: Path) -> None:
    """Time all rows in turn, per network and batch; write table, plot and JSON into ``folder``."""
    _require_known(config)
    torch.set_num_threads(config.threads)
    stages = _stages(config)
    tables = []
    for network in config.networks:
        policy, observed, profile = _policy(config, network)
        rows = [row for row in _rows(config, policy, observed, profile) if _wanted(config, row)]
        started, missing = _started(rows)
        for batch in config.batches:
            measured = _measure(config, policy, started, observed, batch)
            about = {"network": network, "batch": batch, "threads": config.threads, "unavailable": missing}
            tables.append({**about, "rows": measured})
    results = {
        "tables": tables,
        "stages": stages,
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    text = "\n".join(map(_markdown, tables))
    write_whole(folder / "table.md", lambda path: path.write_text(text))
    save_figure(_plot(tables), folder / "latency.png")
    write_results(folder / "results.json", results)
    print(f"{text}\nresults in {folder}")


def _require_known(config: BenchConfig) -> None:
    """Refuse before anything is timed what would otherwise surface late, or be taken for something else."""
    checks = {
        "networks": (config.networks, "checkpoint, kitchen or both", {"checkpoint", "kitchen"} >= set(config.networks)),
        "batches": (config.batches, "batch sizes of at least 1", min(config.batches, default=0) >= 1),
        "ddim_updates": (config.ddim_updates, "pairs", all(len(pair) == 2 for pair in config.ddim_updates)),
    }
    for key, (got, expected, fine) in checks.items():
        if not fine or not (got or key == "ddim_updates"):
            raise InvalidInput(sentence(key, expected=expected, got=got, mend="correct the override"))


def _policy(config: BenchConfig, network: str) -> tuple[DiffusionPolicy, Tensor, FeatureProfile]:
    """Return a policy, normalised observations float32[N, To, Do] to run it on, and its profile."""
    if network == "kitchen":
        policy = random_policy(KITCHEN)
        shape = max(config.batches), KITCHEN.observation_steps, KITCHEN.observation_dim
        observed = torch.rand(shape, generator=torch.Generator().manual_seed(_SEED)) * 2 - 1
        return policy, observed, quick_profile(policy, observed)
    checkpoint = locate_checkpoint(config.checkpoint or config.task.name)
    policy = load_policy(checkpoint, device=config.device)
    spread = demonstrations(config.task).spread_observations(
        max(config.error_observations, *config.batches), policy.observation_steps, _SEED
    )
    return policy, policy.observe(spread), FeatureProfile.load(profile_path(checkpoint, policy.sampler))


def _rows(config: BenchConfig, policy: DiffusionPolicy, observed: Tensor, profile: FeatureProfile) -> Iterator[Row]:
    network, steps = policy.checkpoint.network, policy.spec.process.train_steps
    betas = "squaredcos_cap_v2"
    ancestral = DDPMScheduler(steps, beta_schedule=betas)  # type: ignore[no-untyped-call]
    ddpm = partial(_loop, scheduler=ancestral, steps=steps)
    yield Row(REFERENCE, partial(ddpm, network), steps, None)
    yield Row(
        f"{REFERENCE}, torch.compile",
        lambda: ddpm(cast(DiffusionTransformer, torch.compile(deepcopy(network), dynamic=False))),
        steps,
        None,
    )
    for short in config.reference_ddim:
        scheduler = DDIMScheduler(steps, beta_schedule=betas, timestep_spacing="trailing")  # type: ignore[no-untyped-call]
        yield Row(f"{REFERENCE}, DDIM-{short}", partial(_loop, network, scheduler=scheduler, steps=short), steps, None)
    named = schedules(policy, profile, config.updates)
    yield from hook_rows(policy, named, ddpm)
    for executor in config.executors:
        kind, _, weights = executor.partition(" ")
        yield from executor_rows(
            policy, named, choice("executors", kind, ExecutorKind), choice("executors", weights or "fp32", WeightType)
        )
    yield from ddim_rows(policy, observed, {pair[0]: pair[1] for pair in config.ddim_updates}, ExecutorKind.COMPILED)


def _loop(network: DiffusionTransformer, *, scheduler: Any, steps: int) -> Denoise:
    """Return the denoising loop that users run today; the scheduler draws its own step noise."""
    scheduler.set_timesteps(steps)

    @torch.inference_mode()
    def denoise(observation: Tensor, noise: ChunkNoise) -> Tensor:
        sample = noise.initial
        for timestep in scheduler.timesteps:
            sample = scheduler.step(network(sample, timestep, observation), timestep, sample).prev_sample
        return sample

    return denoise


def _wanted(config: BenchConfig, row: Row) -> bool:
    return config.only is None or row.name == REFERENCE or any(part in row.name for part in config.only)


def _started(rows: list[Row]) -> tuple[list[StartedRow], dict[str, str]]:
    """Build what this machine can; say of the others why not."""
    started, missing = [], {}
    for row in tqdm(rows, desc="build", unit="row"):
        try:
            started.append(start(row))
        except Unavailable as reason:
            missing[row.name] = str(reason)
    return started, missing


def _measure(
    config: BenchConfig, policy: DiffusionPolicy, rows: list[StartedRow], observed: Tensor, batch: int
) -> list[dict[str, Any]]:
    noises = {each.row.steps: _noise(policy, each.row.steps, batch) for each in rows}
    with tqdm(total=len(rows) * (config.warmup + config.calls), desc=f"time batch {batch}", unit="chunk") as bar:

        def call(row: StartedRow) -> None:
            row.denoise(observed[:batch], noises[row.row.steps])
            bar.update()

        latency = measure_interleaved(
            {each.row.name: partial(call, each) for each in rows},
            calls=config.calls,
            warmup=config.warmup,
            synchronise=device_synchroniser(policy.trunk.device),
        )
    reference = latency[REFERENCE].p50_ms
    return [
        {
            "row": each.row.name,
            **latency[each.row.name].to_json(),
            "ratio": reference / latency[each.row.name].p50_ms,
            "gflops": each.row.gflops,
            "action_error": _error(policy, each, observed),
            "start_s": each.start_s,
        }
        for each in rows
    ]


def _error(policy: DiffusionPolicy, row: StartedRow, observed: Tensor) -> float | None:
    """Return the mean action error to the uncached policy on the same noise, None where the sampler is another."""
    if row.row.gflops is None or row.row.steps != policy.sampler.steps:
        return None
    noise = _noise(policy, row.row.steps, len(observed))
    ours, uncached = (denoise(observed, noise)[:, policy.spec.executed] for denoise in (row.denoise, policy.denoiser))
    return float((ours - uncached).abs().mean())


def _noise(policy: DiffusionPolicy, steps: int, batch: int) -> ChunkNoise:
    drawn = policy.draw_noise(batch, [(_SEED, row) for row in range(batch)])
    return ChunkNoise(drawn.initial, drawn.steps[:steps])


def _stages(config: BenchConfig) -> dict[str, Any]:
    """Time the stages of ``predict`` with the task's shipped schedule, batch 1."""
    policy = bac.accelerate(
        load_policy(config.checkpoint or config.task.name, device=config.device), config.stages_schedule
    )
    seen = demonstrations(config.task).spread_observations(1, policy.observation_steps, _SEED)
    stages: dict[str, Callable[[Any], Any]] = {
        "observation encoding": policy.observe,
        "noise": lambda observed: (observed, policy.draw_noise(len(observed))),
        "denoising": lambda inputs: policy.denoiser(*inputs),
        "post-processing": policy.executed,
    }
    timed = measure_stages(stages, seen, calls=config.calls, synchronise=device_synchroniser(policy.trunk.device))
    return {"schedule": config.stages_schedule, "latency_ms": {name: each.to_json() for name, each in timed.items()}}


def _markdown(table: dict[str, Any]) -> str:
    lines = [_COLUMNS, ("---",) * len(_COLUMNS), *map(_cells, table["rows"])]
    title = f"{table['network']}, batch {table['batch']}, {table['threads']} thread(s)"
    return f"**{title}**\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    optional = {"gflops": "{:.2f}", "action_error": "{:.4f}"}
    gflops, error = ("-" if row[key] is None else shown.format(row[key]) for key, shown in optional.items())
    times = f"{row['p50']:.1f}", f"{row['p99']:.1f}", f"{row['ratio']:.1f}x"
    return (row["row"], *times, gflops, error, f"{row['start_s']:.2f}")


def _plot(tables: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(8, 0.25 * sum(len(table["rows"]) for table in tables) + 2),
        layout="constrained",
        squeeze=False,
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        rows = sorted(table["rows"], key=lambda row: -row["p50"])
        p50 = [row["p50"] for row in rows]
        axis.barh([row["row"] for row in rows], p50, xerr=[[0] * len(rows), [row["p99"] - row["p50"] for row in rows]])
        axis.set(
            xscale="log", xlabel="ms per chunk, p50 (whisker: p99)", title=f"{table['network']}, batch {table['batch']}"
        )
        axis.tick_params(labelsize=7)
    return figure


if __name__ == "__main__":
    script("bench", BenchConfig)(main)()
