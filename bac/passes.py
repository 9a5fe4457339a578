"""Pure passes, plan -> plan. ``EXACT`` ones keep every bit; ``fold_reused_runs`` adds in another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

from bac.plan import Add, Combine, CombineGroups, Compute, Fold, Operation, Plan

Pass = Callable[[Plan], Plan]
_Groups = tuple[tuple[int, ...], ...] | None


def fold_reused_runs(plan: Plan) -> Plan:
    """Add a run of consecutive reused features as one sum, which stays valid until one of them updates.

    So too a run of predictions with equal weights, and equal groups of channels if they have any: the j-th features of
    all of them become one sum, and the run one prediction from these sums.

    Changes numerics: (stream + a) + b becomes stream + (a + b), and w a + w b becomes w (a + b).
    """
    next_slot = plan.slots
    valid: dict[tuple[int, ...], int] = {}
    steps = []
    for operations in plan.steps:
        folded: list[Operation] = []
        for run in _runs(operations, plan.groups):
            if len(run) == 1:
                folded.append(run[0])
            else:
                sums = []
                for sources in zip(*(_reads(op) for op in run), strict=True):
                    if sources not in valid:
                        valid[sources] = next_slot
                        folded.append(Fold(sources, next_slot))
                        next_slot += 1
                    sums.append(valid[sources])
                folded.append(_of_sums(run[0], tuple(sums)))
            # A sum outlives its step until one of its features is written.
            written = _written(run[0])
            valid = {sources: slot for sources, slot in valid.items() if written not in sources}
        steps.append(tuple(folded))
    return replace(plan, steps=tuple(steps))


def drop_dead_stores(plan: Plan) -> Plan:
    """Do not keep a feature that nobody reads before it is overwritten or the call ends. Exact."""
    live: set[int] = set()
    steps = []
    for operations in reversed(plan.steps):
        kept: list[Operation] = []
        for op in reversed(operations):
            match op:
                case Compute(block, slot) if slot not in live:
                    op = Compute(block, None)
                case Compute(_, int(slot)):
                    live.discard(slot)
                case Fold(slots, into):
                    live.discard(into)
                    live.update(slots)
                case Add(slot):
                    live.add(slot)
                case Combine(slots, _) | CombineGroups(_, slots, _):
                    live.update(slots)
            kept.append(op)
        steps.append(tuple(reversed(kept)))
    return replace(plan, steps=tuple(reversed(steps)))


def pack_slots(plan: Plan) -> Plan:
    """Let features whose lives do not overlap share a slot, so that a call keeps as few as possible. Exact."""
    last_read = _last_reads(plan)
    free: list[int] = []
    slots = 0
    home: dict[int, int] = {}
    steps = []
    position = 0
    for operations in plan.steps:
        packed: list[Operation] = []
        for op in operations:
            reads = _reads(op)
            ended = [slot for slot in dict.fromkeys(reads) if last_read[slot, position] == position]
            read_from = {slot: home[slot] for slot in reads}
            write = _written(op)
            if write is not None and write not in home:
                if not free:
                    free.append(slots)
                    slots += 1
                home[write] = free.pop()
            packed.append(_renamed(op, read_from, home))
            # Freed after the write found its place: no operation writes a slot that it reads.
            free.extend(home.pop(slot) for slot in ended)
            position += 1
        steps.append(tuple(packed))
    return replace(plan, steps=tuple(steps))


EXACT: tuple[Pass, ...] = (drop_dead_stores, pack_slots)
"""Passes that keep every bit."""

DEFAULT: tuple[Pass, ...] = (fold_reused_runs, *EXACT)
"""What an executor runs."""


def optimise(plan: Plan, passes: tuple[Pass, ...] = DEFAULT) -> Plan:
    """Apply ``passes`` in order."""
    return reduce(lambda current, apply: apply(current), passes, plan)


def _runs(operations: tuple[Operation, ...], groups: _Groups) -> list[tuple[Operation, ...]]:
    """Group consecutive Adds, and consecutive predictions of equal weights; other operations stand alone."""
    runs: list[tuple[Operation, ...]] = []
    for op in operations:
        if runs and _alike(runs[-1][0], op, groups):
            runs[-1] = (*runs[-1], op)
        else:
            runs.append((op,))
    return runs


def _alike(one: Operation, other: Operation, groups: _Groups) -> bool:
    match one, other:
        case Add(), Add():
            return True
        case Combine(_, weights), Combine(_, others):
            return weights == others
        case CombineGroups(block, _, rows), CombineGroups(below, _, others):
            return rows == others and groups is not None and groups[block] == groups[below]
        case _:
            return False


def _of_sums(op: Operation, sums: tuple[int, ...]) -> Operation:
    return replace(op, slots=sums) if isinstance(op, Combine | CombineGroups) else Add(sums[0])


def _reads(op: Operation) -> tuple[int, ...]:
    match op:
        case Add(slot):
            return (slot,)
        case Fold(slots, _) | Combine(slots, _) | CombineGroups(_, slots, _):
            return slots
        case _:
            return ()


def _written(op: Operation) -> int | None:
    match op:
        case Compute(_, slot):
            return slot
        case Fold(_, into):
            return into
        case _:
            return None


def _last_reads(plan: Plan) -> dict[tuple[int, int], int]:
    """Map (slot, position of a read) to the position of the last read before the slot is written again."""
    last: dict[int, int] = {}
    result: dict[tuple[int, int], int] = {}
    operations = list(plan.operations())
    for position in range(len(operations) - 1, -1, -1):
        op = operations[position]
        write = _written(op)
        if write is not None:
            last.pop(write, None)
        for slot in _reads(op):
            result[slot, position] = last.setdefault(slot, position)
    return result


def _renamed(op: Operation, read_from: dict[int, int], home: dict[int, int]) -> Operation:
    match op:
        case Add(slot):
            return Add(read_from[slot])
        case Fold(slots, into):
            return Fold(tuple(read_from[slot] for slot in slots), home[into])
        case Combine(slots, weights):
            return Combine(tuple(read_from[slot] for slot in slots), weights)
        case CombineGroups(block, slots, rows):
            return CombineGroups(block, tuple(read_from[slot] for slot in slots), rows)
        case Compute(block, slot):
            return Compute(block, None if slot is None else home[slot])
