"""Pure passes, plan -> plan. ``EXACT`` ones keep every bit; ``fold_reused_runs`` adds in another order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce

from bac.plan import Add, Combine, Compute, Fold, Operation, Plan

Pass = Callable[[Plan], Plan]


def fold_reused_runs(plan: Plan) -> Plan:
    """Add a run of consecutive reused features as one sum, which stays valid until one of them updates.

    Changes numerics: (stream + a) + b becomes stream + (a + b).
    """
    next_slot = plan.slots
    valid: dict[tuple[int, ...], int] = {}
    steps = []
    for operations in plan.steps:
        folded: list[Operation] = []
        for run in _runs(operations):
            if isinstance(run, tuple) and len(run) > 1:
                if run not in valid:
                    valid[run] = next_slot
                    folded.append(Fold(run, next_slot))
                    next_slot += 1
                folded.append(Add(valid[run]))
            elif isinstance(run, tuple):
                folded.append(Add(run[0]))
            else:
                folded.append(run)
        # A sum is read at its own step before any later block writes; writes end its life for the steps that follow.
        written = {op.slot for op in operations if isinstance(op, Compute)}
        valid = {run: slot for run, slot in valid.items() if written.isdisjoint(run)}
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
                case Combine(slots, _):
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
            write = op.into if isinstance(op, Fold) else op.slot if isinstance(op, Compute) else None
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


def _runs(operations: tuple[Operation, ...]) -> list[tuple[int, ...] | Operation]:
    """Group consecutive Adds into tuples of slots; other operations stand alone."""
    runs: list[tuple[int, ...] | Operation] = []
    for op in operations:
        if not isinstance(op, Add):
            runs.append(op)
        elif runs and isinstance(runs[-1], tuple):
            runs[-1] = (*runs[-1], op.slot)
        else:
            runs.append((op.slot,))
    return runs


def _reads(op: Operation) -> tuple[int, ...]:
    match op:
        case Add(slot):
            return (slot,)
        case Fold(slots, _) | Combine(slots, _):
            return slots
        case _:
            return ()


def _last_reads(plan: Plan) -> dict[tuple[int, int], int]:
    """Map (slot, position of a read) to the position of the last read before the slot is written again."""
    last: dict[int, int] = {}
    result: dict[tuple[int, int], int] = {}
    operations = list(plan.operations())
    for position in range(len(operations) - 1, -1, -1):
        op = operations[position]
        write = op.into if isinstance(op, Fold) else op.slot if isinstance(op, Compute) else None
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
        case Compute(block, slot):
            return Compute(block, None if slot is None else home[slot])
