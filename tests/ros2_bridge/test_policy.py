"""From parameters to a policy that is built and warm: the shipped Push-T policy."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bac
from bac.control import BankEntry, DeviceProfile, Measured, Observation, Request, ScheduleBank
from bac.errors import InvalidInput, Mismatch, MissingArtefact, Unavailable
from bac.executors import select
from bac.methods import CrossChunk, NoCache
from bac.results import run_provenance
from bac.schedule import CacheSchedule
from policies import load_policy
from policies.bank import BANK_FILE, device_path
from policies.loading import bank_folder, locate_checkpoint, make_schedule, schedule_path
from policies.realtime import ChunkSource
from ros2_bridge.policy import _resolve, _warm_inpainting, load
from ros2_bridge.settings import NodeSettings


def _settings(**changed: Any) -> NodeSettings:
    return NodeSettings.read({"task": "push_t", "warmup_calls": 1, "executor": "eager", "cache": "bac-s5"} | changed)


def _request() -> Request:
    values = {"keypoints": np.full((2, 18), 200, np.float32), "agent_position": np.full((2, 2), 100, np.float32)}
    return Request(3, 0, Observation(values, 0), 0, None, 0)


def test_a_chunk_is_the_policy_s_own_to_the_last_bit() -> None:
    ready = load(_settings(caches=["bac-s7"]))
    assert ready.caches == ("bac-s5", "bac-s7")
    assert ready.observation == {"keypoints": (18,), "agent_position": (2,)}
    assert (ready.observation_steps, ready.action_dim, ready.action_steps) == (2, 2, 8)
    assert ready.slowest_ms > 0
    policy = load_policy("push_t")
    for schedule, name in enumerate(ready.caches):
        alone = ChunkSource([bac.accelerate(policy, name, "eager")]).predictor(100000)(_request())
        np.testing.assert_array_equal(ready.chunk(_request(), schedule, 100000), alone)
    assert not np.array_equal(ready.chunk(_request(), 0, 100000), ready.chunk(_request(), 0, 100001))


def _kept() -> dict[str, Path]:
    folder = load_policy("push_t").schedules
    assert folder is not None
    return {path.stem: path for path in folder.glob("*.json")}


def test_a_method_s_name_is_its_most_accurate_kept_schedule(tmp_path: Path) -> None:
    kept = _kept()
    assert _resolve("bac", kept) == "bac-s30"
    assert _resolve("search", kept) == "search-2.38g"
    assert _resolve("bac_weighted", kept) == "bac_weighted-s10"
    assert _resolve("bac-s5", kept) == "bac-s5"
    assert _resolve("search-2.38g", kept) == "search-2.38g"
    assert _resolve("none", kept) == "none"
    with pytest.raises(MissingArtefact, match="cache: expected none or one of"):
        _resolve("uniform", kept)
    # By what is in the files, whatever their names.
    few, many = CacheSchedule.load(kept["bac-s5"]), CacheSchedule.load(kept["bac-s20"])
    for name, schedule in {"search-9g": few, "search-10g": many, "search-2g": few}.items():
        replace(schedule, method="search").save(tmp_path / f"{name}.json")
    found = {path.stem: path for path in sorted(tmp_path.iterdir())}
    assert _resolve("search", found) == "search-10g"
    # A file that nobody asked for may be anything.
    (tmp_path / "torn.json").write_text("{")
    assert _resolve("search-9g", found | {"torn": tmp_path / "torn.json"}) == "search-9g"


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"checkpoint": "gone.safetensors"}, MissingArtefact, "checkpoint"),
        ({"cache": "bac-s999"}, MissingArtefact, "bac-s999"),
        ({"task": "lift", "checkpoint": "push_t"}, Mismatch, "a policy of lift"),
        ({"budget_ms": 80.0}, MissingArtefact, "device profile"),
        ({"device": "nowhere"}, InvalidInput, "device: expected cpu, cuda or cuda:N, got nowhere"),
    ],
)
def test_what_is_missing_or_does_not_belong_is_refused(changed: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        load(_settings(**changed))


def test_a_search_schedule_is_found_by_its_method() -> None:
    ready = load(_settings(cache="search", caches=["bac-s5"]))
    assert (ready.caches, ready.methods) == (("search-2.38g", "bac-s5"), ("search", "bac"))
    assert (ready.index("search"), ready.index("search-2.38g"), ready.index("bac")) == (0, 0, 1)


def test_a_schedule_that_goes_on_from_the_chunk_before_is_refused(tmp_path: Path) -> None:
    policy, checkpoint = load_policy("push_t"), tmp_path / "checkpoint.safetensors"
    checkpoint.symlink_to(locate_checkpoint("push_t"))
    schedule = make_schedule(CrossChunk(updates=10), policy)
    schedule.save(schedule_path(load_policy(checkpoint), "cross_chunk-s10"))
    with pytest.raises(
        InvalidInput, match=r"^cache of a control loop: .* got cross_chunk, which goes on from the chunk"
    ):
        load(_settings(checkpoint=str(checkpoint), cache="cross_chunk-s10"))


def test_a_bank_is_read_once_and_one_that_was_timed_on_another_device_or_torch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.symlink_to(locate_checkpoint("push_t"))
    policy = load_policy(checkpoint)
    name, digest = "ddpm-100/none", policy.checkpoint.digest
    home = bank_folder(policy)
    make_schedule(NoCache(), policy).save(home / f"{name}.json")
    entry = BankEntry(name, f"{name}.json", dict(policy.sampler.identity), 0.0, 1.0)
    ScheduleBank(digest, name, (entry,)).save(home / BANK_FILE)
    kept = device_path(home, policy.trunk.device, executor := select("eager", policy.trunk))
    about = run_provenance(policy.trunk.device, {})
    timed = DeviceProfile(
        checkpoint=digest,
        device=about["device"],
        threads=about["threads"],
        executor=executor.kind,
        dtype=executor.weights,
        versions=about["versions"],
        latency={name: Measured(1.0, 2.0, 100)},
    )
    timed.save(kept)
    settings = _settings(checkpoint=str(checkpoint), budget_ms=80.0)
    read, load_schedule = [], CacheSchedule.load
    monkeypatch.setattr(CacheSchedule, "load", lambda path: read.append(path) or load_schedule(path))
    ready = load(settings)
    assert (ready.caches, ready.methods) == ((name,), ("none",))
    assert read == [home / f"{name}.json"]
    replace(timed, device="another").save(kept)
    with pytest.raises(Mismatch, match=r"^device profile: expected one of .*, got another, "):
        load(settings)
    replace(timed, versions={"torch": "1.0"}).save(kept)
    with pytest.raises(Mismatch, match=r"torch 1\.0; run scripts/latency_budget\.py measure=true on this device\.$"):
        load(settings)


def test_the_bank_that_ships_gives_a_node_the_schedules_of_its_budget(tmp_path: Path) -> None:
    policy = load_policy("push_t")
    shutil.copytree(bank_folder(policy), tmp_path / "bank")
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.symlink_to(locate_checkpoint("push_t"))
    (path,) = (tmp_path / "bank" / "devices").iterdir()
    # As if it had been timed here, with the executor of this test.
    executor, about = select("eager", policy.trunk), run_provenance(policy.trunk.device, {})
    here = {key: about[key] for key in ("device", "threads", "versions")}
    timed = replace(DeviceProfile.load(path), executor=executor.kind, dtype=executor.weights, **here)
    timed.save(device_path(tmp_path / "bank", policy.trunk.device, executor))
    ready = load(_settings(checkpoint=str(checkpoint), budget_ms=80.0))
    ladder = ScheduleBank.load(tmp_path / "bank" / BANK_FILE).on(timed).ladder(80.0, levels=3)
    assert ready.caches == tuple(entry.name for entry in ladder)
    p99 = [timed.latency[name].p99_ms for name in ready.caches]
    assert 80 >= p99[0] > p99[-1]
    assert p99 == sorted(p99, reverse=True)
    assert ready.chunk(_request(), len(p99) - 1, 100000).shape == (15, 2)


def test_schedules_that_were_not_built_are_refused() -> None:
    ready = load(_settings())
    assert ready.index("bac-s5") == ready.index("bac") == 0
    with pytest.raises(Mismatch, match="name it in `caches`"):
        ready.index("bac-s7")
    with pytest.raises(InvalidInput):
        _settings(executor="fast")


def test_every_number_of_committed_actions_is_warmed_for_every_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[tuple[int, int]] = []
    chunks = ChunkSource.chunks

    def noted(source: ChunkSource, observation: Any, keys: Any, committed: Any, level: int = 0) -> np.ndarray:
        warmed.extend((level, len(actions)) for actions in committed if actions is not None)
        return chunks(source, observation, keys, committed, level)

    monkeypatch.setattr(ChunkSource, "chunks", noted)
    load(_settings(caches=["bac-s7"], seam="inpaint", deadline_ticks=2))
    assert warmed == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_no_more_actions_are_committed_than_a_chunk_has() -> None:
    warmed: list[int] = []

    class Source:
        length = 15

        def chunks(self, observation: Any, keys: Any, committed: Any, level: int) -> np.ndarray:
            warmed.extend(len(actions) for actions in committed if actions is not None)
            return np.zeros((1, self.length, 2), np.float32)

    _warm_inpainting(Source(), {}, 1, 1000)  # type: ignore[arg-type]
    assert warmed == list(range(1, 16))


@pytest.mark.parametrize("seam", ["replace", "inpaint"])
def test_a_sampler_that_cannot_inpaint_fails_configure(monkeypatch: pytest.MonkeyPatch, seam: str) -> None:
    def refuse(sampler: object) -> np.ndarray:
        raise Unavailable("committed actions: expected another sampler, got this; use another seam than inpaint.")

    monkeypatch.setattr("bac.executors.committed.path_operator", refuse)
    settings = _settings(seam=seam, deadline_ticks=1)
    if seam == "inpaint":
        with pytest.raises(Unavailable, match="another seam than inpaint"):
            load(settings)
    else:
        load(settings)
