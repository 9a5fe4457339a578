"""Real threads beside a loop on the virtual clock: what they do is waited for, never timed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from scenarios import MS, Robot, consistent, named_actions, settings
from waiting import Settled, answer_from, request, until

from bac.control import ControlLoop, LoopCounters, Request, ThreadInference, VirtualClock
from bac.errors import InvalidInput

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def test_a_thread_answers_what_it_was_asked() -> None:
    inference = ThreadInference(named_actions, VirtualClock())
    assert inference.poll() is None
    for number in (0, 1):
        inference.submit(request(number))
        answer = answer_from(inference)
        assert (answer.request.number, answer.failure) == (number, None)
        assert answer.actions is not None
        assert answer.actions[0] == 100 * number
    inference.close()


def test_submitting_and_polling_never_wait_for_the_work() -> None:
    free = threading.Event()
    inference = ThreadInference(lambda asked: free.wait() and named_actions(asked), VirtualClock())
    inference.submit(request())
    assert inference.poll() is None
    free.set()
    assert answer_from(inference).actions is not None


def test_an_answer_is_stamped_when_it_is_finished_however_late_it_is_fetched() -> None:
    clock = VirtualClock()

    def predict(asked: Request) -> np.ndarray:
        clock.advance_ns(30 * MS)
        if asked.number == 1:
            raise InvalidInput("no.")
        return named_actions(asked)

    inference = ThreadInference(predict, clock)
    for number, finished_ms in ((0, 30), (1, 160)):
        inference.submit(request(number))
        until(lambda: not inference._worker.answers.empty())
        clock.advance_ns(100 * MS)
        assert answer_from(inference).finished_ns == finished_ms * MS


def test_a_refusal_is_an_answer_and_any_other_error_kills_the_thread() -> None:
    def predict(asked: Request) -> np.ndarray:
        if asked.number == 0:
            raise InvalidInput("no.")
        raise RuntimeError("broken")

    inference = ThreadInference(predict, VirtualClock())
    inference.submit(request(0))
    assert answer_from(inference).failure == "no."
    inference.submit(request(1))
    until(lambda: inference.dead)
    assert inference.dead == "RuntimeError: broken"
    inference.restart()
    assert inference.dead is None
    inference.submit(request(0))
    assert answer_from(inference).failure == "no."


def test_what_a_thread_that_was_left_behind_answers_is_thrown_away() -> None:
    free, prepared = threading.Event(), []
    inference = ThreadInference(
        lambda asked: named_actions(asked) if asked.number else free.wait() and named_actions(asked),
        VirtualClock(),
        prepare=lambda: prepared.append(threading.current_thread()),
    )
    inference.submit(request(0))
    inference.restart()
    inference.submit(request(1))
    assert answer_from(inference).request.number == 1
    free.set()
    prepared[0].join()
    assert inference.poll() is None
    assert len(prepared) == 2


def test_a_loop_over_a_thread_that_dies_restarts_it_and_goes_on() -> None:
    def predict(asked: Request) -> np.ndarray:
        if asked.number == 1:
            raise RuntimeError("broken")
        return named_actions(asked)

    clock = VirtualClock()
    loop = ControlLoop(settings(restarts=1), Settled(predict, clock), clock)
    robot = Robot(clock)
    report = loop.run(robot.observe, robot.execute, 10)
    # Asked for at tick 4, found dead at tick 5 and asked for again, there before the tick is over.
    assert robot.story() == "0 1 2 3 4 200 201 202 203 300"
    assert report.counters == LoopCounters(
        ticks=10,
        executed=10,
        requests=4,
        accepted=3,
        given_up=1,
        deadline_misses=1,
        accepted_actions=18,
        replaced_actions=3,
        restarts=1,
    )
    assert consistent(report)
