"""Schedules: what they say, their two text forms, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import BLOCKS, PROVENANCE, random_schedule, schedule_of

from bac.errors import BacError, CorruptArtefact, InvalidInput, Mismatch, MissingArtefact
from bac.schedule import CacheSchedule, Provenance
from bac.trunk import Block, BlockKind

LAYER = ("#..#", "#.#.", "##..")


def document(**changes: Any) -> dict[str, Any]:
    return schedule_of(*LAYER).to_json() | changes


def test_counts_steps_and_updates() -> None:
    schedule = schedule_of(*LAYER)
    assert (schedule.steps, schedule.updates) == (4, 6)


def test_with_last_step_widens_a_copy() -> None:
    schedule = schedule_of(*LAYER)
    widened = schedule.with_last_step()
    assert np.array_equal(widened.mask, schedule_of("#..#", "#.##", "##.#").mask)
    assert np.array_equal(schedule.mask, schedule_of(*LAYER).mask)
    assert (widened.method, widened.parameters) == (schedule.method, schedule.parameters)


def test_mask_belongs_to_the_schedule() -> None:
    mine = np.ones((1, 3), dtype=bool)
    schedule = CacheSchedule(mine, BLOCKS[:1], PROVENANCE, "toy")
    mine[0, 1] = False
    assert schedule.updates == 3
    with pytest.raises(ValueError, match="read-only"):
        schedule.mask[0, 1] = False


def test_grid_is_readable() -> None:
    grid = schedule_of("#..#........", "#.#.#.#.#.#.", "############").grid()
    assert [line.rstrip() for line in grid.splitlines()] == [
        "       0         1",
        " L0.sa #..#........   2",
        " L0.ca #.#.#.#.#.#.   6",
        "L0.ffn ############  12",
    ]


def test_digest_names_the_mask_and_what_it_was_made_for() -> None:
    schedule = schedule_of(*LAYER)
    others = [
        schedule_of("#..#", "#.#.", "###."),
        schedule_of("#..#.", "#.#..", "##..."),  # the same update steps in a longer call
        replace(schedule, blocks=BLOCKS[3:]),
        replace(schedule, provenance=replace(PROVENANCE, checkpoint="decaf")),
        replace(schedule, provenance=replace(PROVENANCE, sampler={"name": "ddim", "steps": 12})),
    ]
    assert len({schedule.digest, *(other.digest for other in others)}) == 6
    assert replace(schedule, method="another", parameters={}).digest == schedule.digest


def test_json_round_trip(tmp_path: Path) -> None:
    schedule = random_schedule(seed=2)
    schedule.save(tmp_path / "deeper" / "s.json")
    # Through text: a document of numpy numbers would pass a round trip in memory and fail on disk.
    for read in (
        CacheSchedule.from_json(json.loads(json.dumps(schedule.to_json()))),
        CacheSchedule.load(str(tmp_path / "deeper" / "s.json")),
    ):
        assert np.array_equal(read.mask, schedule.mask)
        assert read.blocks == schedule.blocks
        assert (read.provenance, read.method) == (schedule.provenance, schedule.method)
        assert read.to_json() == schedule.to_json()
        assert read.digest == schedule.digest


def test_file_has_a_line_per_block(tmp_path: Path) -> None:
    schedule_of(*LAYER).save(tmp_path / "s.json")
    assert '    "L0.ca": [0, 2],\n' in (tmp_path / "s.json").read_text()


def test_failed_save_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    schedule_of(*LAYER).save(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        replace(schedule_of(*LAYER), parameters={"numpy": np.float32(1)}).save(path)
    assert CacheSchedule.load(path).updates == 6
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", list(BlockKind))
def test_block_names_parse_back(kind: BlockKind) -> None:
    assert Block.parse(str(Block(12, kind))) == Block(12, kind)


@pytest.mark.parametrize("name", ["", "L0", "0.sa", "L.sa", "Lx.sa", "L0.mlp", "L-1.sa"])
def test_block_refuses_other_names(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"block name: expected L<layer>.<sa|ca|ffn>, got '.*'; correct the name\."):
        Block.parse(name)


@pytest.mark.parametrize("shape", [(2, 4), (4, 4), (3,), (3, 4, 1), (3, 0)])
def test_refuses_a_mask_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"schedule mask: expected bool\[3 blocks, steps\], got shape"):
        CacheSchedule(np.ones(shape, dtype=bool), BLOCKS[:3], PROVENANCE, "toy")


def test_refuses_a_block_without_step_0() -> None:
    with pytest.raises(InvalidInput, match=r"step 0: expected an update of every block, got none of \['L0.ca'\]"):
        schedule_of("#..", ".#.", "#..")


@pytest.mark.parametrize("outside", [-1, 4, 400])
def test_json_refuses_a_step_out_of_range(outside: int) -> None:
    with pytest.raises(InvalidInput, match=rf"schedule of L0.ca: expected steps in \[0, 4\), got \[{outside}\]"):
        CacheSchedule.from_json(document(updates={"L0.sa": [0], "L0.ca": [0, outside]}))


def test_json_refuses_an_unknown_block() -> None:
    with pytest.raises(BacError, match=r"block name: expected L<layer>.<sa\|ca\|ffn>, got 'L0.mlp'"):
        CacheSchedule.from_json(document(updates={"L0.mlp": [0]}))


@pytest.mark.parametrize(
    "foreign",
    [
        [],
        None,
        {},
        document(format="bac-schedule-0"),
        {key: value for key, value in document().items() if key != "sampler"},
        document(updates=[[0], [0]]),
        document(updates={"L0.sa": 0}),
        document(updates={"L0.sa": ["first"]}),
        document(steps=None),
        document(steps="four"),
        document(steps=10**30),
        document(steps=100_001),
        document(forecast={"L0.sa": [[], [10**400]], "L0.ca": [], "L0.ffn": []}),
    ],
)
def test_json_refuses_foreign_documents(foreign: Any) -> None:
    with pytest.raises(CorruptArtefact, match=r"schedule: expected a bac-schedule-1 document, got .*; write it again"):
        CacheSchedule.from_json(foreign)


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"\xff\x00"]
)
def test_load_refuses_damaged_files(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "s.json"
    schedule_of(*LAYER).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptArtefact, match=r"schedule .*s\.json: expected JSON, got .*; write it again\."):
        CacheSchedule.load(path)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_load_refuses_missing_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(MissingArtefact, match=r"schedule: expected a file .*, got none; run scripts/calibrate\.py\."):
        CacheSchedule.load(tmp_path / name)


@pytest.mark.parametrize(
    ("provenance", "blocks", "steps", "sentence"),
    [
        (Provenance("decaf", PROVENANCE.sampler), 6, 12, "schedule and checkpoint: expected .* c0ffee, got decaf"),
        (Provenance("c0ffee", {"steps": 6}), 6, 12, "schedule and sampler: expected .*'toy'.*, got {'steps': 6}"),
        (PROVENANCE, 6, 11, r"schedule: expected 11 steps of 6 blocks L0.sa..L1.ffn, got 12 steps of 6 blocks"),
        (PROVENANCE, 3, 12, r"schedule: expected 12 steps of 3 blocks L0.sa..L0.ffn, got 12 steps of 6 blocks"),
    ],
)
def test_require_refuses_what_it_was_not_made_for(
    provenance: Provenance, blocks: int, steps: int, sentence: str
) -> None:
    schedule = random_schedule(seed=0)
    schedule.require(PROVENANCE, BLOCKS, 12)
    with pytest.raises(Mismatch, match=sentence + ".*; run scripts/calibrate.py"):
        schedule.require(provenance, BLOCKS[:blocks], steps)
