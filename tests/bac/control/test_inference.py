"""Real threads and processes beside a loop on the virtual clock: what they do is waited for, never timed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scenarios import Robot, consistent, named_actions, numbers, settings

from bac.control import Command, ControlLoop, Observation, ProcessPredictor, Request, ThreadInference, VirtualClock
from bac.control.inference import Answer
from bac.control.process_inference import ProcessDied
from bac.errors import InvalidInput, Unavailable

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def request(number: int = 0) -> Request:
    return Request(number, 0, Observation(None, 0), 0, None, 0)


def answer_from(inference: ThreadInference) -> Answer:
    """Wait, in real time, for what a thread does."""
    done = threading.Event()
    while (answer := inference.poll()) is None:
        assert inference.dead is None
        done.wait(0.001)
    return answer


def until(happens: Callable[[], object]) -> None:
    while not happens():
        threading.Event().wait(0.001)


class Settled(ThreadInference):
    """A thread that the loop finds finished, or dead, at the tick after it submitted."""

    def poll(self) -> Answer | None:
        if getattr(self, "waiting", False):
            kept: list[Answer] = []
            until(lambda: self.dead or kept or kept.extend(a for a in [super(Settled, self).poll()] if a))
            self.waiting = False
            return kept[0] if kept else None
        return super().poll()

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.waiting = True


def test_a_thread_answers_what_it_was_asked() -> None:
    inference = ThreadInference(named_actions)
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
    inference = ThreadInference(lambda asked: free.wait() and named_actions(asked))
    inference.submit(request())
    assert inference.poll() is None
    free.set()
    assert answer_from(inference).actions is not None


def test_a_refusal_is_an_answer_and_any_other_error_kills_the_thread() -> None:
    def predict(asked: Request) -> np.ndarray:
        if asked.number == 0:
            raise InvalidInput("no.")
        raise RuntimeError("broken")

    inference = ThreadInference(predict)
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
    loop = ControlLoop(settings(restarts=1), Settled(predict), clock)
    robot = Robot(clock)
    report = loop.run(robot.observe, robot.execute, 10)
    # Asked for at tick 4, found dead at tick 5 and asked for again, there before the tick is over.
    assert robot.story() == "0 1 2 3 4 200 201 202 203 300"
    assert numbers(report, "restarts", "given_up", "executed") == [1, 1, 10]
    assert consistent(report)


def serve(refuse: int) -> Callable[[Request], np.ndarray]:
    def predict(asked: Request) -> np.ndarray:
        if asked.number == refuse:
            raise InvalidInput("not this one.")
        return named_actions(asked)

    return predict


def test_a_killed_inference_process_is_started_again_and_no_tick_is_lost() -> None:
    predictor = ProcessPredictor(partial(serve, refuse=3))
    clock = VirtualClock()
    loop = ControlLoop(settings(restarts=1), Settled(predictor), clock)
    robot = Robot(clock)
    pids: set[int | None] = set()

    def execute(command: Command) -> None:
        robot.execute(command)
        pids.add(predictor.pid)
        if command.tick == 1:
            assert predictor.pid is not None
            os.kill(predictor.pid, signal.SIGKILL)
            predictor._process.join()

    report = loop.run(robot.observe, execute, 16)
    predictor.close()
    assert [command.tick for command in robot.commands] == list(range(16))
    # The process that died at tick 1 is found dead, and made anew, when it is needed at tick 4; chunk 3 is refused.
    assert robot.story() == "0 1 2 3 100 101 102 103 200 201 202 203 204 400 401 402"
    assert len(pids) == 2
    assert numbers(report, "ticks", "skipped", "restarts", "refused") == [16, 0, 0, 1]
    assert report.counters.last_refusal == "not this one."


def hang(asked: Request) -> np.ndarray:
    if asked.number == 0:
        signal.pause()
    return named_actions(asked)


def make_hanging() -> Callable[[Request], np.ndarray]:
    return hang


def test_a_process_that_hangs_is_killed_by_the_next_request_whose_answer_is_its_own() -> None:
    predictor = ProcessPredictor(make_hanging)
    left_behind: list[BaseException] = []

    def predict(asked: Request) -> np.ndarray:
        try:
            return predictor(asked)
        except ProcessDied as died:
            left_behind.append(died)
            raise

    inference = ThreadInference(predict)
    inference.submit(request(0))
    until(lambda: predictor._waiting is not None)
    hanging = predictor.pid
    inference.restart()
    inference.submit(request(1))
    answer = answer_from(inference)
    assert answer.actions is not None
    assert (answer.request.number, answer.actions[0]) == (1, 100)
    assert predictor.pid != hanging
    until(lambda: left_behind)
    assert str(left_behind[0]) == f"inference process {hanging} died"
    inference.submit(request(2))
    assert answer_from(inference).request.number == 2
    predictor.close()


def die(_: Request) -> np.ndarray:
    os._exit(1)


def test_a_process_that_dies_at_work_says_so() -> None:
    predictor = ProcessPredictor(make_dying)
    with pytest.raises(ProcessDied, match=r"^inference process \d+ died$"):
        predictor(request())
    predictor.close()


def make_dying() -> Callable[[Request], np.ndarray]:
    return die


def make_when_there(path: Path) -> Callable[[Request], np.ndarray]:
    until(path.exists)
    return named_actions


def test_a_process_may_load_for_longer_than_inference_may_be_silent(tmp_path: Path) -> None:
    predictor = ProcessPredictor(partial(make_when_there, tmp_path / "weights"))
    inference, clock = ThreadInference(predictor), VirtualClock()
    loop = ControlLoop(settings(stall_ms=150.0), inference, clock)
    robot = Robot(clock)
    loop.run(robot.observe, robot.execute, 1)
    until(lambda: predictor.loading)
    loop.run(robot.observe, robot.execute, 20)
    (tmp_path / "weights").touch()
    until(lambda: not predictor.loading)
    answer = answer_from(inference)
    inference.poll = lambda: answer  # type: ignore[method-assign]
    report = loop.run(robot.observe, robot.execute, 21)
    assert robot.story() == 20 * ". " + "0"
    assert numbers(report, "requests", "given_up", "accepted", "stops") == [2, 0, 1, 0]
    # Now it is loaded, and silent for longer than it may be.
    inference.poll = lambda: None  # type: ignore[method-assign]
    report = loop.run(robot.observe, robot.execute, 40)
    assert robot.story() == 20 * ". " + "0 1 2 3 4 5 !"
    predictor.close()


def test_a_call_while_the_process_loads_waits_for_it_and_the_earlier_one_is_refused(tmp_path: Path) -> None:
    predictor = ProcessPredictor(partial(make_when_there, tmp_path / "weights"))
    refused: list[str] = []

    def predict(asked: Request) -> np.ndarray:
        try:
            return predictor(asked)
        except Unavailable as refusal:
            refused.append(str(refusal))
            raise

    inference = ThreadInference(predict)
    inference.submit(request(0))
    until(lambda: predictor.pid)
    loading = predictor.pid
    inference.restart()
    inference.submit(request(1))
    until(lambda: predictor._calls == 2)
    (tmp_path / "weights").touch()
    answer = answer_from(inference)
    assert answer.actions is not None
    assert (answer.request.number, answer.actions[0], predictor.pid) == (1, 100, loading)
    until(lambda: refused)
    assert refused == ["inference process: expected one request, got a later one while it loaded; ask again."]
    predictor.close()


def test_a_process_is_loaded_by_start_and_once() -> None:
    predictor = ProcessPredictor(make_hanging)
    predictor.start()
    started = predictor.pid
    predictor.start()
    assert predictor(request(1))[0] == 100
    assert (predictor.pid, predictor.loading) == (started, False)
    predictor.close()
    predictor.start()
    assert predictor.pid != started
    predictor.close()


def test_a_process_that_dies_while_it_loads_says_so_and_is_started_again(tmp_path: Path) -> None:
    predictor = ProcessPredictor(partial(make_once, tmp_path / "tried"))
    with pytest.raises(ProcessDied, match=r"^inference process \d+ died while it loaded$"):
        predictor.start()
    assert not predictor.loading
    assert predictor(request(1))[0] == 100
    predictor.close()


def make_once(path: Path) -> Callable[[Request], np.ndarray]:
    if not path.exists():
        path.touch()
        os._exit(1)
    return named_actions
