"""Write a cached policy as one ONNX graph: ``python scripts/export.py task=push_t cache=bac``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from bac.acceleration import build_executor
from bac.errors import CorruptArtefact, Unavailable, sentence
from bac.executors import ExecutorKind
from bac.files import write_whole
from bac.onnx_graph import Units, onnx_graph
from bac.results import run_provenance, write_results
from configs.entry import script
from configs.schema import ExportConfig
from configs.tasks import HELD_OUT_SEED, demonstrations, require_task
from policies.diffusion_policy import DiffusionPolicy
from policies.loading import load_policy, make_schedule

GRAPH_FILE = "chunk.onnx"
TOLERANCE = 1e-4
"""Normalised units: float32 sums in another order, carried through all denoising steps."""


def main(config: ExportConfig, folder: Path) -> None:
    """Write ``chunk.onnx`` and a JSON into ``folder``, once the graph has been run and agrees with the policy.

    The graph takes observations in task units, keys side by side, and gives the whole chunk in task units.
    """
    source = config.checkpoint or config.task.name
    policy = load_policy(source, sampler=config.sampler.build, weights=config.weights)
    require_task(config.task, policy.spec)
    if policy.spec.vision is not None:
        raise Unavailable(
            sentence(
                "export",
                expected="a low-dim policy",
                got="an image policy",
                mend="play it with scripts/eval.py, where executor=onnx takes schedules of few updates",
            )
        )
    schedule = make_schedule(config.cache.build(), policy)
    schedule.require_plain("ONNX graph")
    executor = build_executor(schedule, policy.trunk, policy.sampler, policy.provenance, ExecutorKind.EAGER)
    seen, done = policy.checkpoint.observation_normalizer, policy.checkpoint.action_normalizer
    exported = onnx_graph(
        executor.plan,
        policy.trunk,
        policy.sampler,
        observation_units=Units(seen.scale.numpy(), seen.offset.numpy()),
        chunk_units=Units((1 / done.scale).numpy(), (-done.offset / done.scale).numpy()),
        metadata={
            "task": config.task.name,
            "observation": ", ".join(f"{key} {size}" for key, size in policy.spec.observation.items()),
            "executed": f"{policy.spec.executed.start} to {policy.spec.executed.stop}",
            "sampler": policy.sampler.name,
            "schedule": schedule.digest,
            "checkpoint": policy.provenance.checkpoint,
        },
    )
    model = exported.whole()
    graph = model.SerializeToString()
    error = _disagreement(config, graph, policy.with_denoiser(executor))
    if not error <= TOLERANCE:
        raise CorruptArtefact(
            sentence("exported graph", expected=f"an error of at most {TOLERANCE}", got=error, mend="report this")
        )
    write_whole(folder / GRAPH_FILE, lambda path: path.write_bytes(graph))
    results = {
        "error": error,
        "nodes": len(model.graph.node),
        "bytes": len(graph),
        "schedule": schedule.digest,
        "provenance": run_provenance(torch.device("cpu"), asdict(config)),
    }
    write_results(folder / "results.json", results)
    print(f"wrote {folder / GRAPH_FILE}: {len(model.graph.node)} nodes, {len(graph) / 1e6:.1f} MB, error {error:.1e}")


def _disagreement(config: ExportConfig, graph: bytes, policy: DiffusionPolicy) -> float:
    """Return the largest difference of the graph's chunk to the policy's, normalised units."""
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(
            sentence(
                "checking the graph", expected="the package onnxruntime", got="none", mend="pip install onnxruntime"
            )
        ) from error
    demos = demonstrations(config.task, config.demonstrations)
    spread = demos.spread_observations(config.check_observations, policy.observation_steps, HELD_OUT_SEED)
    observation = policy.spec.concatenate(spread)
    noise = policy.draw_noise(len(observation), [(row, 0) for row in range(len(observation))])
    inputs = {"observation": observation, "initial_noise": noise.initial.numpy(), "step_noise": noise.steps.numpy()}
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    used = {each.name for each in session.get_inputs()}
    (chunk,) = session.run(["chunk"], {name: values for name, values in inputs.items() if name in used})
    normalised = policy.checkpoint.action_normalizer.normalize(torch.from_numpy(chunk))
    return float(np.abs((normalised - policy.denoiser(policy.observe(spread), noise)).numpy()).max())


if __name__ == "__main__":
    script("export", ExportConfig)(main)()
