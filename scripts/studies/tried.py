"""What was tried to make a plan fast on a CPU, and what each attempt gives on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from bac.decoder import DecoderLayer
from bac.executors import EagerExecutor, ExecutorKind, WeightType
from bac.files import write_whole
from bac.methods import full_schedule
from bac.passes import optimise
from bac.plan import lower
from bac.profile import FeatureProfile
from bac.results import run_provenance, write_results
from bac.schedule import CacheSchedule
from bac.trunk import Block, BlockKind
from configs.studies import BenchConfig
from policies.benchmark import Denoise, Row, executor_rows, schedules
from policies.diffusion_policy import DiffusionPolicy
from policies.diffusion_transformer import DiffusionTransformer
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.loading import load_policy, profile_path
from studies.latency import reference_loop
from studies.rows import REFERENCE, markdown_table, started, timed, wanted

_COLUMNS = ("what runs the chunk", "p50 ms", "p99 ms", "against reference", "warm-up s")


def run(config: BenchConfig, folder: Path) -> None:
    """Time every attempt at batch 1, in turn; write table and JSON into ``folder``."""
    policy = load_policy(config.checkpoint or config.task.name, device=config.device)
    profile = FeatureProfile.load(profile_path(policy))
    rows = _rows(policy, schedules(policy, profile, config.updates))
    built, missing = started((row for row in rows if wanted(config, row)), policy)
    latency = timed(config, policy, built, policy.observe(policy.spec.blank_observation()), "tried")
    results = [
        {
            "row": each.row.name,
            **latency[each.row.name].to_json(),
            "ratio": latency[REFERENCE].p50_ms / latency[each.row.name].p50_ms,
            "start_s": each.start_s,
        }
        for each in built
    ]
    text = markdown_table(_COLUMNS, map(_cells, results))
    write_whole(folder / "tried.md", lambda path: path.write_text(text))
    provenance = run_provenance(torch.device(config.device), asdict(config))
    write_results(folder / "results.json", {"rows": results, "unavailable": missing, "provenance": provenance})
    print(f"{text}\nresults in {folder}")


def _rows(policy: DiffusionPolicy, named: dict[str, CacheSchedule]) -> Iterator[Row]:
    steps = policy.sampler.steps
    yield Row(REFERENCE, partial(reference_loop, steps=steps), steps, None)
    yield Row("network by torch.compile", partial(reference_loop, steps=steps, compiled=True), steps, None)
    yield Row("whole step by torch.compile, full", _whole_steps, steps, None)
    for name, schedule in named.items():
        yield Row(f"branches by torch.compile, {name}", partial(_branches, schedule=schedule), steps, None)
    for kind in (ExecutorKind.EAGER, ExecutorKind.ONNX, ExecutorKind.COMPILED):
        yield from executor_rows(policy, named, kind)
    yield from executor_rows(policy, named, ExecutorKind.COMPILED, WeightType.BF16)


class _StepCompiled(DiffusionTransformerTrunk):
    """All branches as one block, compiled by Inductor."""

    def __init__(self, network: DiffusionTransformer) -> None:
        super().__init__(network)
        self._count = len(self.blocks)
        self.blocks = (Block(0, BlockKind.SELF_ATTENTION),)
        self._compiled = torch.compile(self._all_branches, dynamic=False)

    def branch(self, block: int, stream: Tensor, table: Tensor, condition: list[Tensor]) -> Tensor:
        """Return what all branches together add."""
        return self._compiled(stream, table, condition)

    def _all_branches(self, stream: Tensor, table: Tensor, condition: list[Tensor]) -> Tensor:
        result = stream
        for block in range(self._count):
            result = result + super().branch(block, result, table, condition)
        return result - stream


class _BranchesCompiled(DiffusionTransformerTrunk):
    """One Inductor graph per kind of branch, with the weights of the layer as inputs."""

    def __init__(self, network: DiffusionTransformer) -> None:
        super().__init__(network)
        self._plain = self.decoder()
        parts: tuple[Callable[..., Tensor], ...] = (self._self_attention_of, self._cross_attention_of, _feed_forward)
        self._compiled = [torch.compile(part, dynamic=False) for part in parts]

    def branch(self, block: int, stream: Tensor, table: Tensor, condition: list[Tensor]) -> Tensor:
        """Return the feature float[B, T, d] of block number ``block``."""
        number, kind = divmod(block, 3)
        seen = (table[number], condition[number]) if kind == 1 else ()
        return self._compiled[kind](stream, self._plain.layers[number], *seen)

    def _self_attention_of(self, stream: Tensor, layer: DecoderLayer) -> Tensor:
        q, k, v = F.linear(_norm(stream, layer.norm1), *layer.self_in).chunk(3, dim=-1)
        return F.linear(self._attend(q, k, v, self._network.mask), *layer.self_out)

    def _cross_attention_of(self, stream: Tensor, layer: DecoderLayer, time: Tensor, observed: Tensor) -> Tensor:
        q = F.linear(_norm(stream, layer.norm2), *layer.cross_in)
        k, v = torch.cat((time.expand(len(stream), 1, -1), observed), dim=1).chunk(2, dim=-1)
        return F.linear(self._attend(q, k, v, self._network.memory_mask), *layer.cross_out)


def _feed_forward(stream: Tensor, layer: DecoderLayer) -> Tensor:
    return F.linear(F.gelu(F.linear(_norm(stream, layer.norm3), *layer.hidden)), *layer.out)


def _norm(stream: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    return F.layer_norm(stream, stream.shape[-1:], *weights)


def _whole_steps(policy: DiffusionPolicy) -> Denoise:
    trunk = _StepCompiled(policy.checkpoint.network)
    plan = lower(full_schedule(trunk.blocks, policy.sampler.steps, policy.provenance))
    return EagerExecutor(optimise(plan), trunk, policy.sampler)


def _branches(policy: DiffusionPolicy, *, schedule: CacheSchedule) -> Denoise:
    return EagerExecutor(optimise(lower(schedule)), _BranchesCompiled(policy.checkpoint.network), policy.sampler)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["row"],
        f"{row['p50']:.1f}",
        f"{row['p99']:.1f}",
        f"{row['ratio']:.1f}x",
        f"{row['start_s'] + row['warmup_s']:.1f}",
    )
