"""What every executor must do, whatever it is made of: the eager executor's chunk, and nothing kept between calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import NoHostReads, alike, random_forecast, random_schedule, with_groups

from bac.errors import InvalidInput, Mismatch, TooLarge, Unavailable
from bac.executors import (
    ChunkNoise,
    CompiledExecutor,
    CudaGraphExecutor,
    EagerExecutor,
    ExecutorKind,
    OnnxExecutor,
    Selection,
    WeightType,
    select,
)
from bac.executors.toolchain import build_library
from bac.onnx_graph import onnx_graph
from bac.passes import optimise
from bac.plan import Plan, lower
from bac.sampler_table import SamplerTable
from bac.schedule import CacheSchedule
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.diffusion_trunk import DiffusionTransformerTrunk
from policies.samplers import DiffusionProcess, ddim, ddpm, dpm_solver

PROCESS = DiffusionProcess(train_steps=9)
# Sums of float32 products in another order, carried through nine steps; actions are of size 1.
TOLERANCE = 1e-5
# One tile and several, tiles that do not divide the tokens, one observation and more, one action channel and more.
SIZES = [
    DiffusionTransformerConfig(action_dim=2, observation_dim=5, horizon=16, layers=2, heads=4, width=64),
    DiffusionTransformerConfig(action_dim=7, observation_dim=3, horizon=10, layers=1, heads=1, width=48),
    DiffusionTransformerConfig(
        action_dim=1, observation_dim=4, horizon=29, observation_steps=4, layers=2, heads=2, width=32
    ),
]
SMALL = SIZES[0]


def trunk_of(config: DiffusionTransformerConfig, seed: int = 0) -> DiffusionTransformerTrunk:
    torch.manual_seed(seed)
    network = DiffusionTransformer(config).eval().requires_grad_(False)
    # At the initial 0.02 every branch is nearly dead and no error would show.
    for parameter in network.parameters():
        parameter.normal_(std=0.1)
    return DiffusionTransformerTrunk(network)


def inputs(
    config: DiffusionTransformerConfig, batch: int, steps: int, seed: int = 0
) -> tuple[torch.Tensor, ChunkNoise]:
    draw = torch.Generator().manual_seed(seed)
    chunk = batch, config.horizon, config.action_dim
    observation = torch.randn(batch, config.observation_steps, config.observation_dim, generator=draw)
    return observation, ChunkNoise(torch.randn(chunk, generator=draw), torch.randn(steps, *chunk, generator=draw))


def plan_for(trunk: DiffusionTransformerTrunk, sampler: SamplerTable, seed: int) -> Plan:
    return optimise(lower(random_schedule(seed, sampler.steps, trunk.blocks)))


def record_on_cpu(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Callable[[], object]]:
    """Stand in for a graph: the same buffers, the same memory for the result, nothing read back once it is warm."""
    run()
    with NoHostReads():
        chunk = run()
    return chunk, lambda: chunk.copy_(run())


def compiled(plan: Plan, trunk: DiffusionTransformerTrunk, sampler: SamplerTable) -> object:
    return Selection(ExecutorKind.COMPILED).build(plan, trunk, sampler)


def graphed(plan: Plan, trunk: DiffusionTransformerTrunk, sampler: SamplerTable) -> object:
    return CudaGraphExecutor(plan, trunk, sampler, record=record_on_cpu)


EXECUTORS = pytest.mark.parametrize(
    "make", [EagerExecutor, compiled, graphed, OnnxExecutor], ids=["eager", "compiled", "cuda_graph", "onnx"]
)


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    patch = pytest.MonkeyPatch()
    patch.setenv("BAC_CACHE", str(tmp_path_factory.mktemp("compiled")))
    yield
    patch.undo()


@EXECUTORS
@pytest.mark.parametrize("config", SIZES, ids=lambda config: f"T{config.horizon}")
@pytest.mark.parametrize("sampler", [ddpm(PROCESS), ddim(PROCESS, 4), dpm_solver(PROCESS, 5)], ids=lambda s: s.name)
def test_is_the_eager_executor(make: Callable, config: DiffusionTransformerConfig, sampler: SamplerTable) -> None:
    trunk = trunk_of(config)
    for seed, batch in enumerate([1, 2, 5]):
        plan, (observation, noise) = plan_for(trunk, sampler, seed), inputs(config, batch, sampler.steps, seed)
        expected = EagerExecutor(plan, trunk, sampler)(observation, noise)
        torch.testing.assert_close(make(plan, trunk, sampler)(observation, noise), expected, rtol=0, atol=TOLERANCE)


def predicted(schedule: CacheSchedule) -> CacheSchedule:
    return replace(schedule, forecast=random_forecast(schedule.mask, seed=0))


def grouped(schedule: CacheSchedule) -> CacheSchedule:
    return with_groups(schedule, SMALL.width)


PREDICTIONS = {
    "predicted": predicted,
    "folded": lambda schedule: alike(predicted(schedule)),
    "grouped": grouped,
    "grouped and folded": lambda schedule: alike(grouped(schedule)),
}


@EXECUTORS
@pytest.mark.parametrize("predict", PREDICTIONS.values(), ids=PREDICTIONS)
def test_predictions_are_the_eager_executors(make: Callable, predict: Callable) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    schedule = random_schedule(5, 9, trunk.blocks)
    plan = optimise(lower(predict(schedule)))
    observation, noise = inputs(SMALL, 2, 9)
    expected = EagerExecutor(plan, trunk, sampler)(observation, noise)
    torch.testing.assert_close(make(plan, trunk, sampler)(observation, noise), expected, rtol=0, atol=TOLERANCE)
    held = EagerExecutor(optimise(lower(schedule)), trunk, sampler)(observation, noise)
    assert (held - expected).abs().max() > 0.01


def test_schedules_show_in_the_chunk() -> None:
    # Guards the test above: on a network whose branches add nothing it could not fail.
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    chunks = [EagerExecutor(plan_for(trunk, sampler, seed), trunk, sampler)(*inputs(SMALL, 1, 9)) for seed in (0, 1)]
    assert (chunks[0] - chunks[1]).abs().max() > 0.01


@EXECUTORS
def test_nothing_survives_a_call(make: Callable) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    calls = [inputs(SMALL, batch, 9, seed) for seed, batch in [(0, 2), (1, 2), (2, 1)]]
    execute, again = (make(plan_for(trunk, sampler, 3), trunk, sampler) for _ in range(2))
    forwards = [execute(*call) for call in calls]
    backwards = [again(*call) for call in reversed(calls)]
    assert all(map(torch.equal, forwards, reversed(backwards)))
    assert not torch.equal(forwards[0], forwards[1])


@EXECUTORS
def test_two_threads_do_not_see_each_other(make: Callable) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    execute = make(plan_for(trunk, sampler, 4), trunk, sampler)
    calls = [inputs(SMALL, 1, 9, seed) for seed in range(8)]
    alone = [execute(*call) for call in calls]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda call: execute(*call), calls))
    assert all(map(torch.equal, together, alone))


@EXECUTORS
def test_inputs_stay_as_they_are(make: Callable) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    observation, noise = inputs(SMALL, 2, 9)
    before = [tensor.clone() for tensor in (observation, noise.initial, noise.steps)]
    make(plan_for(trunk, sampler, 0), trunk, sampler)(observation, noise)
    assert all(map(torch.equal, before, (observation, noise.initial, noise.steps)))


@EXECUTORS
def test_strided_noise_is_read_right(make: Callable) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    execute = make(plan_for(trunk, sampler, 0), trunk, sampler)
    observation, noise = inputs(SMALL, 4, 9)
    strided = ChunkNoise(noise.initial[::2], noise.steps[:, ::2])
    expected = execute(observation[::2], ChunkNoise(strided.initial.contiguous(), strided.steps.contiguous()))
    assert torch.equal(execute(observation[::2], strided), expected)


@EXECUTORS
def test_refuses_what_does_not_fit(make: Callable) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    with pytest.raises(Mismatch, match="plan: expected 9 steps of 6 blocks, got 8 steps"):
        make(lower(random_schedule(0, 8, trunk.blocks)), trunk, sampler)
    execute = make(plan_for(trunk, sampler, 0), trunk, sampler)
    observation, noise = inputs(SMALL, 2, 9)
    with pytest.raises(InvalidInput, match="chunk noise: expected"):
        execute(observation[:1], noise)


@pytest.mark.parametrize("make", [compiled, OnnxExecutor])
def test_refuses_groups_of_another_width(make: Callable) -> None:
    # Read on as they are they would be memory of something else.
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    schedule = random_schedule(0, 9, trunk.blocks)
    with pytest.raises(Mismatch, match="plan: expected groups of 64 channels, got 63 channels; lower"):
        make(lower(with_groups(schedule, 63)), trunk, sampler)
    execute = make(lower(schedule), trunk, sampler)
    if isinstance(execute, CompiledExecutor):
        with pytest.raises(Mismatch, match="groups of 64 channels"):
            execute.with_plan(lower(with_groups(schedule, 63)))


@pytest.mark.parametrize("make", [compiled, OnnxExecutor])
def test_refuses_noise_of_another_type_or_chunk(make: Callable) -> None:
    # Read as float32 it would be memory of something else.
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    execute = make(plan_for(trunk, sampler, 0), trunk, sampler)
    observation, noise = inputs(SMALL, 1, 9)
    with pytest.raises(InvalidInput, match=r"expected float32 of chunks .* got torch\.float64"):
        execute(observation, ChunkNoise(noise.initial.double(), noise.steps.double()))
    with pytest.raises(InvalidInput, match=r"expected float32 of chunks \[16, 2\], .* of chunks \[15, 2\]"):
        execute(observation, ChunkNoise(noise.initial[:, 1:], noise.steps[:, :, 1:]))


def test_bf16_rounds_the_matrices_of_the_layers_and_nothing_else() -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan, (observation, noise) = plan_for(trunk, sampler, 0), inputs(SMALL, 2, 9)
    chunk = Selection(ExecutorKind.COMPILED, WeightType.BF16).build(plan, trunk, sampler)(observation, noise)
    # The condition is encoded by the trunk itself, from its own weights, so it is built before they are rounded.
    rounded, exact = trunk_of(SMALL), trunk_of(SMALL)
    for layer in rounded.decoder().layers:
        for weight, _ in (layer.self_in, layer.self_out, layer.cross_in, layer.cross_out, layer.hidden, layer.out):
            weight.copy_(weight.to(torch.bfloat16))
    rounded.condition, rounded.step_tables = exact.condition, exact.step_tables
    expected = EagerExecutor(plan, rounded, sampler)(observation, noise)
    torch.testing.assert_close(chunk, expected, rtol=0, atol=TOLERANCE)
    assert not torch.allclose(chunk, EagerExecutor(plan, trunk, sampler)(observation, noise), atol=TOLERANCE)


def test_second_start_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan = plan_for(trunk, sampler, 0)
    compiled(plan, trunk, sampler)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("compiled again"))
    compiled(plan, trunk, sampler)


def test_another_plan_on_the_same_packed_weights() -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    first, second = (plan_for(trunk, sampler, seed) for seed in (0, 1))
    execute, call = compiled(first, trunk, sampler), inputs(SMALL, 2, 9)
    rebound = execute.with_plan(second)
    assert rebound.plan is second
    assert torch.equal(rebound(*call), compiled(second, trunk, sampler)(*call))
    assert torch.equal(execute(*call), compiled(first, trunk, sampler)(*call))
    with pytest.raises(Mismatch):
        execute.with_plan(lower(random_schedule(0, 8, trunk.blocks)))


def test_no_compiler_refuses_by_name_and_auto_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trunk = trunk_of(SMALL)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = r"C\+\+ compiler: expected one of c\+\+, .* got none; install g\+\+, or use executor=eager"
    with pytest.raises(Unavailable, match=told):
        select("compiled", trunk)
    chosen = select("auto", trunk)
    assert chosen.kind is ExecutorKind.EAGER
    assert chosen.to_json()["because"].startswith("C++ compiler: expected")
    with pytest.raises(Unavailable, match=told):
        select("auto", trunk, "bf16")


def test_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'decoder.cpp:1: error: no such vector' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("BAC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(Unavailable, match=r"compiling decoder\.cpp: expected success of .*no such vector; use g\+\+"):
        select("compiled", trunk_of(SMALL))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_library_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BAC_CACHE", str(tmp_path))
    source = tmp_path / "one.cpp"
    source.write_text('extern "C" int one() { return 1; }')
    # Compiled once, in the name that the cache has for it, and damaged before anything has loaded it.
    with monkeypatch.context() as context:
        context.setattr("bac.executors.toolchain.ctypes.CDLL", str)
        library = Path(build_library(source, {}))
    library.write_bytes(library.read_bytes()[:100])
    assert build_library(source, {}).one() == 1


def test_a_folder_that_holds_no_programs_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr("bac.executors.toolchain.ctypes.CDLL", refuse)
    told = r"compiled code: expected a library that can be loaded, got .*failed to map .*; set BAC_CACHE to a folder"
    with pytest.raises(Unavailable, match=told):
        select("compiled", trunk_of(SMALL))
    assert select("auto", trunk_of(SMALL)).kind is ExecutorKind.EAGER


def test_cache_that_cannot_be_written_refuses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BAC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(Unavailable, match=r"cache of compiled code: expected a writable folder, got .*set BAC_CACHE"):
        select("compiled", trunk_of(SMALL))
    assert select("auto", trunk_of(SMALL)).kind is ExecutorKind.EAGER


def test_auto_on_a_cpu_is_compiled() -> None:
    assert select("auto", trunk_of(SMALL)) == Selection(ExecutorKind.COMPILED)


def test_trunk_of_another_form_falls_back_to_eager() -> None:
    odd = trunk_of(DiffusionTransformerConfig(action_dim=2, observation_dim=3, heads=2, width=40))
    assert select("auto", odd).because == (
        "executor compiled: expected attention heads of a multiple of 16 channels, got 40 channels in 2 heads; "
        "use executor=eager."
    )


@pytest.mark.parametrize(
    ("kind", "weights", "told"),
    [
        ("fast", "fp32", "executor: expected one of auto, eager, compiled, cuda_graph, onnx, got fast"),
        ("auto", "fp8", "executor weights: expected one of fp32, bf16, got fp8"),
        ("eager", "bf16", "executor weights: expected fp32 for executor eager on cpu, got bf16"),
    ],
)
def test_unknown_choices_refuse(kind: str, weights: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        select(kind, trunk_of(SMALL), weights)


def test_cuda_graph_without_a_gpu_refuses() -> None:
    with pytest.raises(
        Unavailable, match="executor cuda_graph: expected a CUDA device, got cpu; use executor=compiled"
    ):
        select("cuda_graph", trunk_of(SMALL))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_onnx_packages_refuse(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    with pytest.raises(Unavailable, match=f"the package {package}, got none; pip install"):
        OnnxExecutor(plan_for(trunk, sampler, 0), trunk, sampler)


def test_onnx_refuses_a_graph_that_breaks_the_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    plan = plan_for(trunk, sampler, 0)
    nodes = len(onnx_graph(plan, trunk, sampler).model.graph.node)
    monkeypatch.setattr("bac.executors.onnx._MOST_NODES", nodes)
    OnnxExecutor(plan, trunk, sampler)
    monkeypatch.setattr("bac.executors.onnx._MOST_NODES", nodes - 1)
    with pytest.raises(TooLarge, match=rf"at most {nodes - 1} nodes, got {nodes}; use executor=compiled"):
        OnnxExecutor(plan, trunk, sampler)


def test_onnx_graph_stores_every_weight_once() -> None:
    trunk, sampler = trunk_of(SMALL), ddpm(PROCESS)
    model = onnx_graph(plan_for(trunk, sampler, 0), trunk, sampler, metadata={"task": "toy"}).whole()
    shapes = [
        tuple(weight.dims)
        for weight in model.graph.initializer
        if weight.dims[:1] and weight.name.endswith("hidden.weight")
    ]
    # One per layer, and the condition encoder's.
    assert shapes == [(4 * SMALL.width, SMALL.width)] * (SMALL.layers + 1)
    assert {prop.key: prop.value for prop in model.metadata_props} == {"task": "toy"}
    assert {opset.version for opset in model.opset_import} == {17}
