"""One action chunk under every executor, schedule and sampler, against the loop that users run today."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from bac.errors import InvalidInput, Unavailable, sentence
from bac.executors import ChunkNoise, ExecutorKind
from bac.files import write_whole
from bac.pictures import plain_log_axis, save_figure
from bac.profile import FeatureProfile
from bac.results import run_provenance, write_results
from configs.studies import BenchConfig
from configs.tasks import HELD_OUT_SEED, demonstrations
from policies.benchmark import (
    KITCHEN,
    Denoise,
    PolicySource,
    Row,
    StartedRow,
    ddim_rows,
    executor_rows,
    hook_rows,
    noise_of,
    quick_profile,
    random_policy,
    row_memory,
    schedules,
)
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer
from policies.loading import load_policy, profile_path
from studies.rows import REFERENCE, markdown_table, require_package, started, timed, wanted
from studies.stages import stages_markdown, starts_markdown, time_stages, time_starts

_COLUMNS = ("row", "p50 ms", "p99 ms", "against reference", "GFLOPs", "action error", "memory MiB", "warm-up s")
_BETAS = "squaredcos_cap_v2"


def run(config: BenchConfig, folder: Path) -> None:
    """Time all rows in turn, per network and batch; write table, plot and JSON into ``folder``."""
    _require_known(config)
    of_checkpoint = "checkpoint" in config.networks
    stages, starts = (time_stages(config), time_starts(config)) if of_checkpoint else ({}, {})
    tables = []
    for network in config.networks:
        source, observed, profile = _network(config, network)
        policy = source()
        rows = [row for row in _rows(config, policy, observed, profile) if wanted(config, row)]
        memory = _memory(rows, source) if config.memory else {}
        built, missing = started(rows, policy)
        errors = _errors(policy, built, observed[: config.error_observations]) if network == "checkpoint" else {}
        for batch in config.batches:
            latency = timed(config, policy, built, observed[:batch], f"{network}, batch {batch}")
            reference = latency[REFERENCE].p50_ms
            table = [
                {
                    "row": each.row.name,
                    **latency[each.row.name].to_json(),
                    "ratio": reference / latency[each.row.name].p50_ms,
                    "gflops": each.row.gflops,
                    "action_error": errors.get(each.row.name),
                    "memory": memory.get(each.row.name),
                    "start_s": each.start_s,
                }
                for each in built
            ]
            about = {"network": network, "batch": batch, "threads": config.threads, "unavailable": missing}
            tables.append({**about, "rows": table})
    results = {
        "tables": tables,
        "stages": stages,
        "starts": starts,
        "provenance": run_provenance(torch.device(config.device), asdict(config)),
    }
    once = [starts_markdown(starts), stages_markdown(stages)] if of_checkpoint else []
    text = "\n".join([*map(_markdown, tables), *once])
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
    require_package(REFERENCE, "diffusers", "diffusers")


def _network(config: BenchConfig, network: str) -> tuple[PolicySource, Tensor, FeatureProfile]:
    """Return what makes the policy, normalised observations float32[N, To, Do] to run it on, and its profile."""
    if network == "kitchen":
        source: PolicySource = partial(random_policy, KITCHEN, device=config.device)
        shape = max(config.batches), KITCHEN.observation_steps, KITCHEN.observation_dim
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(HELD_OUT_SEED)) * 2 - 1
        observed = drawn.to(config.device)
        return source, observed, quick_profile(source(), observed)
    source = partial(load_policy, config.checkpoint or config.task.name, device=config.device)
    policy = source()
    spread = demonstrations(config.task, config.demonstrations).spread_observations(
        max(config.error_observations, *config.batches), policy.observation_steps, HELD_OUT_SEED
    )
    return source, policy.observe(spread), FeatureProfile.load(profile_path(policy))


def _rows(config: BenchConfig, policy: DiffusionPolicy, observed: Tensor, profile: FeatureProfile) -> Iterator[Row]:
    steps = policy.spec.process.train_steps
    yield Row(REFERENCE, partial(reference_loop, steps=steps), steps, None)
    yield Row(f"{REFERENCE}, torch.compile", partial(reference_loop, steps=steps, compiled=True), steps, None)
    for short in config.reference_ddim:
        yield Row(f"{REFERENCE}, DDIM-{short}", partial(reference_loop, steps=short, ddim=True), short, None)
    named = schedules(policy, profile, config.updates)
    yield from hook_rows(policy, named, partial(user_loop, steps=steps))
    for kind, weights in config.chosen_executors():
        yield from executor_rows(policy, named, kind, weights)
    best = ExecutorKind.COMPILED if policy.trunk.device.type == "cpu" else ExecutorKind.CUDA_GRAPH
    yield from ddim_rows(policy, observed, {pair[0]: pair[1] for pair in config.ddim_updates}, best)


def reference_loop(policy: DiffusionPolicy, *, steps: int, ddim: bool = False, compiled: bool = False) -> Denoise:
    """Return what users run today: the network as it is under a diffusers scheduler."""
    network = policy.checkpoint.network
    if compiled:
        network = cast(DiffusionTransformer, torch.compile(deepcopy(network), dynamic=False))
    return user_loop(policy, network, steps=steps, ddim=ddim)


def user_loop(policy: DiffusionPolicy, network: DiffusionTransformer, *, steps: int, ddim: bool = False) -> Denoise:
    """Return the denoising loop that users write around a network; a DDPM scheduler draws its own step noise."""
    diffusers = require_package(REFERENCE, "diffusers", "diffusers")
    train_steps = policy.spec.process.train_steps
    if ddim:
        scheduler = diffusers.DDIMScheduler(train_steps, beta_schedule=_BETAS, timestep_spacing="trailing")
    else:
        scheduler = diffusers.DDPMScheduler(train_steps, beta_schedule=_BETAS)
    scheduler.set_timesteps(steps)

    @torch.inference_mode()
    def denoise(observation: Tensor, noise: ChunkNoise) -> Tensor:
        sample = noise.initial
        for timestep in scheduler.timesteps:
            estimate = network(sample, timestep.to(sample.device), observation)
            sample = scheduler.step(estimate, timestep, sample).prev_sample
        return sample

    return denoise


def _memory(rows: list[Row], source: PolicySource) -> dict[str, int | None]:
    """Measure the peak of every row in processes of their own, two at a time; None for a row that cannot be built."""

    def measure(row: Row) -> int | None:
        try:
            return row_memory(row, source)
        except Unavailable:
            return None

    with ThreadPoolExecutor(2) as pool:
        peaks = list(tqdm(pool.map(measure, rows), total=len(rows), desc="memory", unit="row"))
    return {row.name: peak for row, peak in zip(rows, peaks, strict=True)}


def _errors(policy: DiffusionPolicy, rows: list[StartedRow], observed: Tensor) -> dict[str, float]:
    """Return mean action errors to the uncached policy on the same noise, of rows that take its sampler and noise."""
    noise = noise_of(policy, policy.sampler.steps, len(observed))
    uncached = policy.denoiser(observed, noise)[:, policy.spec.executed]
    comparable = [each for each in rows if each.row.gflops is not None and each.row.steps == policy.sampler.steps]
    return {
        each.row.name: float((each.denoise(observed, noise)[:, policy.spec.executed] - uncached).abs().mean())
        for each in tqdm(comparable, desc="action error", unit="row")
    }


def _markdown(table: dict[str, Any]) -> str:
    calls = min(row["calls"] for row in table["rows"])
    title = f"**{table['network']}, batch {table['batch']}, {table['threads']} thread(s), {calls} calls of each row**"
    missing = "".join(f"\n- {name}: not here; {reason}" for name, reason in table["unavailable"].items())
    return f"{title}\n\n{markdown_table(_COLUMNS, map(_cells, table['rows']))}{missing}\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    optional = {"gflops": "{:.2f}", "action_error": "{:.4f}", "memory": "{:.0f}"}
    scaled = row | {"memory": row["memory"] and row["memory"] / 2**20}
    shown = ("-" if scaled[key] is None else form.format(scaled[key]) for key, form in optional.items())
    times = f"{row['p50']:.1f}", f"{row['p99']:.1f}", f"{row['ratio']:.1f}x"
    return (row["row"], *times, *shown, f"{row['start_s'] + row['warmup_s']:.1f}")


def _plot(tables: list[dict[str, Any]]) -> Figure:
    figure, axes = plt.subplots(
        len(tables),
        1,
        figsize=(8, 0.2 * sum(len(table["rows"]) for table in tables) + 2),
        height_ratios=[len(table["rows"]) + 3 for table in tables],
        layout="constrained",
        squeeze=False,
    )
    for axis, table in zip(axes[:, 0], tables, strict=True):
        rows = sorted(table["rows"], key=lambda row: -row["p50"])
        p50 = [row["p50"] for row in rows]
        axis.barh([row["row"] for row in rows], p50, xerr=[[0] * len(rows), [row["p99"] - row["p50"] for row in rows]])
        axis.set(xlabel="ms per chunk, p50 (whisker: p99)", title=f"{table['network']}, batch {table['batch']}")
        axis.margins(y=0.01)
        axis.tick_params(labelsize=7)
        plain_log_axis(axis, "x")
    return figure
