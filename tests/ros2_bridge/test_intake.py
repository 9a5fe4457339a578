"""Observation frames, and every reason not to take a message."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bac.control.clock import NS_PER_MS
from bac.errors import InvalidInput, Mismatch
from ros2_bridge.conversion import Refusal
from ros2_bridge.intake import Intake
from ros2_bridge.mapping import KeySource, SourceKind, require_sources
from ros2_bridge.transport import CONTESTED
from tests.ros2_bridge.toys import Bench

SOURCES = [
    KeySource("joints", "joint_states", SourceKind.JOINT_STATE, ("shoulder", "elbow")),
    KeySource("place", "place", SourceKind.POSE, ("x", "y")),
]


class Table:
    """An intake beside a bench's clock and messages."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.clock = self.bench.clock
        self.intake = Intake(SOURCES, {"joints": (2,), "place": (2,)}, self.clock, silence_ms=250, ahead_ms=50)

    def joints(self, source: str = "robot", **given: Any) -> None:
        self.intake.receive("joint_states", self.bench.joints(**given), source)

    def place(self, source: str = "robot", **given: Any) -> None:
        self.intake.receive("place", self.bench.place(**given), source)

    def unreadable(self) -> None:
        """Of a type that has been read wrongly by the middleware, or that no test thought of."""
        message = self.bench.joints()
        message.position = message.name
        self.intake.receive("joint_states", message, "robot")

    def x(self) -> float | None:
        frame = self.intake.frame()
        return None if frame is None else float(frame.values["place"][0])


@pytest.fixture
def table() -> Table:
    return Table()


def test_a_frame_needs_every_topic_and_is_as_old_as_the_oldest(table: Table) -> None:
    table.joints(age_ms=30)
    assert table.intake.frame() is None
    assert table.intake.missing == ["place"]
    table.place(age_ms=10)
    frame = table.intake.frame()
    assert frame is not None
    assert frame.stamp_ns == table.clock.now_ns() - 30 * NS_PER_MS
    np.testing.assert_array_equal(frame.values["joints"], [0.5, -1.25])
    np.testing.assert_array_equal(frame.values["place"], [7, 2])


def test_a_frame_is_given_once(table: Table) -> None:
    table.joints()
    table.place()
    assert table.x() == 7
    assert table.x() is None
    table.clock.advance_ms(1)
    table.place(x=8.0)
    assert table.x() == 8


def test_age_is_fixed_at_arrival(table: Table) -> None:
    table.joints(age_ms=30)
    table.place(age_ms=10)
    before = table.clock.now_ns()
    table.clock.advance_ms(500)
    frame = table.intake.frame()
    assert frame is not None
    assert frame.stamp_ns == before - 30 * NS_PER_MS


Refused = tuple[Callable[[Table], None], Refusal]
REFUSED: dict[str, Refused] = {
    "backwards": (lambda table: table.place(x=9.0, age_ms=1), Refusal.BACKWARDS),
    "future": (lambda table: table.place(x=9.0, age_ms=-51), Refusal.FUTURE),
    "second publisher": (lambda table: table.place("other", x=9.0), Refusal.SECOND_PUBLISHER),
    "contested": (lambda table: table.place(CONTESTED, x=9.0), Refusal.SECOND_PUBLISHER),
    "not finite": (lambda table: table.place(x=np.nan), Refusal.NOT_FINITE),
    "names": (lambda table: table.joints(names=("shoulder",)), Refusal.NAMES),
    "unreadable": (lambda table: table.unreadable(), Refusal.MALFORMED),
    "malformed": (lambda table: table.intake.malformed("place", "no message"), Refusal.MALFORMED),
}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_refused_messages_are_counted_and_leave_what_was_there(table: Table, case: str) -> None:
    table.joints()
    table.place()
    assert table.x() == 7
    send, kind = REFUSED[case]
    for _ in range(3):
        send(table)
    assert table.intake.refused == {kind: 3}
    assert table.intake.received == 5
    assert table.intake.last_refusal
    assert table.intake.frame() is None


def test_clocks_of_two_computers_may_disagree_a_little(table: Table) -> None:
    table.joints(age_ms=-50)
    table.place(age_ms=-50)
    frame = table.intake.frame()
    assert frame is not None
    # Never in the future: the loop refuses that.
    assert frame.stamp_ns == table.clock.now_ns()


def test_another_publisher_is_heard_when_the_first_was_silent(table: Table) -> None:
    table.joints()
    table.place()
    assert table.x() == 7
    table.clock.advance_ms(250)
    table.place("returned", x=8.0)
    assert table.intake.refused == {Refusal.SECOND_PUBLISHER: 1}
    table.clock.advance_ms(1)
    table.place("returned", x=8.0)
    assert table.x() == 8
    table.place(x=9.0)
    assert table.intake.refused == {Refusal.SECOND_PUBLISHER: 2}


def test_after_clear_the_clock_may_have_gone_back(table: Table) -> None:
    table.joints()
    table.place()
    table.intake.clear()
    assert table.intake.missing == ["joint_states", "place"]
    table.joints(age_ms=100)
    table.place(x=8.0, age_ms=100)
    assert table.x() == 8
    assert not table.intake.refused


def test_a_burst_leaves_the_newest_and_loses_no_count(table: Table) -> None:
    table.joints()
    for number in range(500):
        table.clock.advance_ms(2)
        table.place(x=float(number))
    assert table.x() == 499
    assert table.intake.received == 501
    assert not table.intake.refused


def test_waiting_ends_when_given_up(table: Table) -> None:
    given_up, ended = threading.Event(), []
    waiting = threading.Thread(target=lambda: ended.append(table.intake.wait_complete(given_up)))
    waiting.start()
    given_up.set()
    table.intake.wake()
    waiting.join(10)
    assert ended == [False]
    table.joints()
    table.place()
    assert table.intake.wait_complete(threading.Event())


def test_sources_must_be_the_policy_s_observation() -> None:
    require_sources(SOURCES, {"joints": (2,), "place": (2,)})
    for observation, words in (
        ({"joints": (2,)}, "observation_keys"),
        ({"joints": (3,), "place": (2,)}, "observation.joints: expected 3 names"),
        ({"joints": (2,), "place": (8, 8, 3)}, "observation.place: expected an image topic"),
    ):
        with pytest.raises(Mismatch, match=words):
            require_sources(SOURCES, observation)
    two = [*SOURCES[:1], KeySource("place", "joint_states", SourceKind.POSE, ("x", "y"))]
    with pytest.raises(Mismatch, match="topic joint_states: expected one type"):
        require_sources(two, {"joints": (2,), "place": (2,)})


@pytest.mark.parametrize(
    "given",
    [
        {"kind": SourceKind.POSE, "names": ("x", "yaw")},
        {"kind": SourceKind.POSE},
        {"kind": SourceKind.JOINT_STATE},
        {"kind": SourceKind.ARRAY, "names": ("x",)},
        {"kind": SourceKind.ARRAY, "quantity": "torque"},
        {"kind": SourceKind.ARRAY, "topic": ""},
    ],
)
def test_sources_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"observation\.key"):
        KeySource(**{"key": "key", "topic": "topic"} | given)
