"""The plan: a schedule lowered to a straight list of operations per step, with nothing left to decide at run time.

A plan has a text form (a line per step) that parses back::

    000: L0.sa>0 L0.ca>1 L0.ffn>2
    001: +0 L0.ca>1 +2
    002: 3=0+1+2 +3

``L0.sa>0`` computes the branch on the stream, keeps the feature in slot 0 and adds it; ``L0.sa`` does not keep it;
``+0`` adds slot 0; ``3=0+1+2`` puts the sum of slots 0, 1 and 2 into slot 3; ``+0*1.5+4*-0.5``, a prediction, adds 1.5
times slot 0 and -0.5 times slot 4. Where groups of channels are predicted differently, a line per block comes first, a
digit per channel, and a weight has a value per group::

    L0.sa=0010
    004: +0*1.5|2.0+1*-0.5|-1.0@L0.sa
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bac.errors import CorruptArtefact, InvalidInput, sentence
from bac.predictions import GROUP_DIGITS, Weight
from bac.schedule import CacheSchedule
from bac.trunk import Block, TrunkCost


@dataclass(frozen=True)
class Compute:
    """Run branch ``block`` on the stream, keep its feature in ``slot`` unless None, add it to the stream."""

    block: int
    slot: int | None


@dataclass(frozen=True)
class Add:
    """Add the feature in ``slot`` to the stream."""

    slot: int


@dataclass(frozen=True)
class Fold:
    """Put the sum of the features in ``slots`` into slot ``into``, which is none of them."""

    slots: tuple[int, ...]
    into: int


@dataclass(frozen=True)
class Combine:
    """Add the sum of the features in ``slots``, each times its weight, to the stream: a predicted feature.

    Several predicted features at once where each slot holds the sum of as many computed ones.
    """

    slots: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class CombineGroups:
    """Combine by groups of channels: ``weights[j][g]`` is that of slot j in the channels of ``block``'s group g."""

    block: int
    slots: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]


Operation = Compute | Add | Fold | Combine | CombineGroups

Source = int | tuple[tuple[int, Weight], ...]
"""Where a feature in the stream comes from: the step it was computed at, or (step, weight) pairs of a prediction."""


@dataclass(frozen=True)
class Plan:
    """Operations per denoising step.

    Attributes:
        blocks: names for the block numbers, in the order of the stream.
        steps: per step, its operations in order.
        groups: per block, the group of each of the d channels; None where no operation asks for them.
    """

    blocks: tuple[Block, ...]
    steps: tuple[tuple[Operation, ...], ...]
    groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def slots(self) -> int:
        """Number of feature slots a call needs: one more than the highest one named."""
        return 1 + max((slot for op in self.operations() for slot in _slots(op)), default=-1)

    def operations(self) -> Iterator[Operation]:
        """Yield all operations in the order of execution."""
        for operations in self.steps:
            yield from operations

    def block_calls(self) -> Counter[Block]:
        """Return how often a call computes each block."""
        return Counter(self.blocks[op.block] for op in self.operations() if isinstance(op, Compute))

    def channel_weights(self, op: CombineGroups) -> np.ndarray:
        """Return float64[slots, d], the weight of each slot of ``op`` in each channel."""
        assert self.groups is not None  # simulate refuses plans that lack them
        return np.array(op.weights)[:, self.groups[op.block]]

    def __str__(self) -> str:
        width = max(3, len(str(len(self.steps) - 1)))
        rows = zip(self.blocks, self.groups or (), strict=self.groups is not None)
        groups = (f"{block}={''.join(GROUP_DIGITS[group] for group in row)}" for block, row in rows)
        lines = (
            " ".join([f"{step:0{width}}:", *(_show(op, self.blocks) for op in operations)])
            for step, operations in enumerate(self.steps)
        )
        return "\n".join((*groups, *lines))

    @classmethod
    def parse(cls, text: str, blocks: tuple[Block, ...]) -> Plan:
        """Read back what ``str`` gives.

        Raises:
            CorruptArtefact: a line does not begin with its step, or a word is no operation on these blocks.
        """
        numbers = {str(block): number for number, block in enumerate(blocks)}
        steps = []
        lines = text.strip().splitlines()
        groups = _read_groups(lines, blocks)
        for step, line in enumerate(lines[len(groups or ()) :]):
            label, *words = line.split()
            if not re.fullmatch(rf"0*{step}:", label):
                raise CorruptArtefact(
                    sentence("plan text", expected=f"a line of step {step}", got=repr(line), mend="number the lines")
                )
            steps.append(tuple(_read(word, numbers) for word in words))
        return cls(blocks, tuple(steps), groups)


@dataclass(frozen=True)
class PlanCost:
    """FLOPs of one call at batch 1.

    Attributes:
        planned: what the plan or the schedule computes.
        original: what the original network with the same schedule would compute; the published figures count this.
        hoisted: ``original - planned``, work that depends on the step or the observation alone and left the loop.
        branches: the part of ``planned`` spent in residual branches.
    """

    planned: int
    original: int
    branches: int

    @property
    def hoisted(self) -> int:
        """FLOPs that the original spends in the loop and the plan does not."""
        return self.original - self.planned


def lower(schedule: CacheSchedule) -> Plan:
    """Return the plain plan of a schedule, no pass applied.

    Block i of B lives in slot i; where predictions read p features, the latest ones take turns in slots i, i + B, ...

    Raises:
        Unavailable: the schedule has token maps or recalls: lower its ``plain`` schedule for an executor that knows
            what to make of them.
    """
    schedule.require_plain("plan")
    count, history = len(schedule.blocks), schedule.history
    homes: list[deque[int]] = [deque(maxlen=history) for _ in schedule.blocks]
    updates = np.cumsum(schedule.mask, axis=1) - 1

    def operation(block: int, step: int) -> Operation:
        if schedule.mask[block, step]:
            homes[block].appendleft(block + count * (int(updates[block, step]) % history))
            return Compute(block, homes[block][0])
        terms = schedule.weights(block, step)
        slots = tuple(homes[block][place] for place, _ in terms)
        shared = tuple(weight for _, weight in terms if isinstance(weight, float))
        if shared == (1.0,):
            return Add(slots[0])
        if len(shared) == len(terms):
            return Combine(slots, shared)
        return CombineGroups(block, slots, tuple(weight for _, weight in terms if isinstance(weight, tuple)))

    steps = tuple(tuple(operation(block, step) for block in range(count)) for step in range(schedule.steps))
    return Plan(schedule.blocks, steps, _rows(schedule.groups))


def simulate(plan: Plan) -> tuple[tuple[tuple[int, Source], ...], ...]:
    """Run a plan on symbols instead of tensors.

    Returns:
        Per step, the (block, source) pairs that reach the head, in the order they were added.

    Raises:
        InvalidInput: an operation reads an empty slot, or a branch runs on a stream that is not its own input.
    """
    held: dict[int, tuple[tuple[int, Source], ...]] = {}
    result = []
    for step, operations in enumerate(plan.steps):
        stream: tuple[tuple[int, Source], ...] = ()
        for op in operations:
            match op:
                case Fold(slots, into):
                    held[into] = tuple(pair for slot in slots for pair in _held(held, slot, step))
                case Add(slot):
                    stream += _held(held, slot, step)
                case Combine(slots, weights):
                    stream += _predicted([_held(held, slot, step) for slot in slots], weights, step)
                case CombineGroups(block, slots, group_weights):
                    entries = _predicted([_held(held, slot, step) for slot in slots], group_weights, step)
                    others = [other for other, _ in entries if not _same_groups(plan, block, other)]
                    if others:
                        raise _unsound(f"blocks with the groups of {plan.blocks[block]}", others, step)
                    stream += entries
                case Compute(block, slot):
                    if [number for number, _ in stream] != list(range(block)):
                        raise _unsound(f"{plan.blocks[block]} to see all {block} blocks above it", stream, step)
                    stream += ((block, step),)
                    if slot is not None:
                        held[slot] = ((block, step),)
        result.append(stream)
    return tuple(result)


def verify(plan: Plan, schedule: CacheSchedule) -> None:
    """Refuse a plan that does not do exactly what the schedule says.

    Raises:
        InvalidInput: at some step, some block's feature is missing, twice there, or from another step, or other
            channels are predicted together.
    """
    if plan.groups != _rows(schedule.groups):
        raise _unsound("the schedule's groups of channels", "others", 0)
    if len(plan.steps) != schedule.steps:
        raise _unsound(f"{schedule.steps} steps", f"{len(plan.steps)} steps", len(plan.steps))
    for step, stream in enumerate(simulate(plan)):
        expected = tuple((block, _source(schedule.terms(block, step))) for block in range(len(schedule.blocks)))
        if stream != expected:
            raise _unsound(f"features {expected}", stream, step)


def cost(plan: Plan, trunk: TrunkCost) -> PlanCost:
    """Count the FLOPs of a plan on a trunk (additions of features are not matrix products and not counted)."""
    calls = plan.block_calls()
    return _cost([calls[block] for block in plan.blocks], len(plan.steps), trunk)


def schedule_cost(schedule: CacheSchedule, trunk: TrunkCost) -> PlanCost:
    """Count the FLOPs of a call of a schedule on a trunk, each update by its ``CacheSchedule.share``.

    Where every update is a whole one, this is the cost of the schedule's plan.
    """
    return _cost(schedule.share.sum(axis=1).tolist(), schedule.steps, trunk)


def _cost(updates: Sequence[float], steps: int, trunk: TrunkCost) -> PlanCost:
    """Return the cost of ``updates`` per block, whole ones or parts."""

    def spent(branch: tuple[int, ...]) -> int:
        return round(sum(flops * each for flops, each in zip(branch, updates, strict=False)))

    branches = spent(trunk.branch)
    return PlanCost(
        planned=branches + steps * trunk.step + trunk.call,
        original=spent(trunk.original_branch) + steps * trunk.original_step,
        branches=branches,
    )


def _show(op: Operation, blocks: tuple[Block, ...]) -> str:
    match op:
        case Compute(block, None):
            return str(blocks[block])
        case Compute(block, slot):
            return f"{blocks[block]}>{slot}"
        case Add(slot):
            return f"+{slot}"
        case Fold(slots, into):
            return f"{into}={'+'.join(map(str, slots))}"
        case Combine(slots, weights):
            return "".join(f"+{slot}*{weight!r}" for slot, weight in zip(slots, weights, strict=True))
        case CombineGroups(block, slots, group_weights):
            terms = zip(slots, group_weights, strict=True)
            return "".join(f"+{slot}*{'|'.join(map(repr, row))}" for slot, row in terms) + f"@{blocks[block]}"


def _read_groups(lines: list[str], blocks: tuple[Block, ...]) -> tuple[tuple[int, ...], ...] | None:
    """Read the lines before step 0, one per block, if there are any."""
    found = [_GROUPS.fullmatch(line) for line in lines[: len(blocks)]]
    if not found or found[0] is None:
        return None
    rows = {each["block"]: tuple(map(GROUP_DIGITS.index, each["digits"])) for each in found if each}
    if list(rows) != list(map(str, blocks)) or len(set(map(len, rows.values()))) > 1:
        raise CorruptArtefact(
            sentence("plan text", expected="a line of groups per block", got=list(rows), mend="give them all")
        )
    return tuple(rows.values())


_GROUPS = re.compile(r"(?P<block>L\d+\.\w+)=(?P<digits>[0-9a-z]+)")
_NUMBER = r"-?[\d.]+(e-?\d+)?"
_OPERATION = re.compile(
    r"\+(?P<add>\d+)"
    r"|(?P<into>\d+)=(?P<fold>\d+(\+\d+)*)"
    rf"|(?P<terms>(\+\d+\*{_NUMBER})+)"
    rf"|(?P<rows>(\+\d+\*{_NUMBER}(\|{_NUMBER})*)+)@(?P<groups>L\d+\.\w+)"
    r"|(?P<block>L\d+\.\w+)(>(?P<slot>\d+))?"
)


def _read(word: str, numbers: dict[str, int]) -> Operation:
    found = _OPERATION.fullmatch(word)
    if found is None or not {found["block"], found["groups"]} <= {None, *numbers}:
        raise CorruptArtefact(
            sentence("plan text", expected="operations on known blocks", got=repr(word), mend="correct the word")
        )
    if found["add"]:
        return Add(int(found["add"]))
    if found["fold"]:
        return Fold(tuple(int(slot) for slot in found["fold"].split("+")), int(found["into"]))
    if terms := found["terms"] or found["rows"]:
        slots, weights = zip(*(term.split("*") for term in terms[1:].split("+")), strict=True)
        if found["terms"]:
            return Combine(tuple(map(int, slots)), tuple(map(float, weights)))
        rows = tuple(tuple(map(float, weight.split("|"))) for weight in weights)
        return CombineGroups(numbers[found["groups"]], tuple(map(int, slots)), rows)
    return Compute(numbers[found["block"]], None if found["slot"] is None else int(found["slot"]))


def _slots(op: Operation) -> tuple[int, ...]:
    match op:
        case Compute(_, slot):
            return () if slot is None else (slot,)
        case Add(slot):
            return (slot,)
        case Fold(slots, into):
            return (*slots, into)
        case Combine(slots, _) | CombineGroups(_, slots, _):
            return slots


def _rows(groups: np.ndarray | None) -> tuple[tuple[int, ...], ...] | None:
    return None if groups is None else tuple(map(tuple, groups.tolist()))


def _same_groups(plan: Plan, block: int, other: int) -> bool:
    return plan.groups is not None and (block == other or plan.groups[block] == plan.groups[other])


def _source(terms: tuple[tuple[int, Weight], ...]) -> Source:
    return terms[0][0] if len(terms) == 1 and terms[0][1] == 1 else terms


def _predicted(
    features: list[tuple[tuple[int, Source], ...]], weights: tuple[Weight, ...], step: int
) -> tuple[tuple[int, Source], ...]:
    """Return the entries of a prediction, refused unless all slots hold computed features of the same blocks."""
    blocks = {tuple(block for block, _ in feature) for feature in features}
    computed = all(isinstance(source, int) for feature in features for _, source in feature)
    if not computed or len(blocks) != 1 or len(features) != len(weights):
        raise _unsound("a prediction from computed features of the same blocks", features, step)
    return tuple(
        (entries[0][0], _source(tuple((source, weight) for (_, source), weight in zip(entries, weights, strict=True))))
        for entries in zip(*features, strict=True)
    )


def _held(held: dict[int, tuple[tuple[int, Source], ...]], slot: int, step: int) -> tuple[tuple[int, Source], ...]:
    if slot not in held:
        raise _unsound(f"slot {slot} to hold a feature", "nothing", step)
    return held[slot]


def _unsound(expected: str, got: object, step: int) -> InvalidInput:
    return InvalidInput(sentence(f"plan at step {step}", expected=expected, got=got, mend="mend the pass that made it"))
