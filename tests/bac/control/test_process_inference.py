"""Real processes behind a thread: killed, hanging, loading, breaking; what they do is waited for, never timed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pickle import PicklingError

import numpy as np
import pytest
from scenarios import Robot, consistent, named_actions, numbers, settings
from waiting import Settled, answer_from, request, until

from bac.control import Command, ControlLoop, LoopCounters, ProcessPredictor, Request, ThreadInference, VirtualClock
from bac.control.process_inference import ProcessDied
from bac.errors import InvalidInput, Unavailable

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def serve(refuse: int) -> Callable[[Request], np.ndarray]:
    def predict(asked: Request) -> np.ndarray:
        if asked.number == refuse:
            raise InvalidInput("not this one.")
        return named_actions(asked)

    return predict


def test_an_idle_inference_process_that_is_killed_is_counted_and_started_again_for_the_next_chunk() -> None:
    predictor = ProcessPredictor(partial(serve, refuse=3))
    clock = VirtualClock()
    loop = ControlLoop(settings(restarts=1), Settled(predictor, clock), clock)
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
    # The process that died at tick 1 is found dead when it is needed, at tick 4, and made anew; chunk 3 is refused.
    assert robot.story() == "0 1 2 3 4 200 201 202 203 204 400 401 402 403 500 501"
    assert len(pids) == 2
    assert report.counters == LoopCounters(
        ticks=16,
        executed=16,
        requests=6,
        accepted=4,
        refused=1,
        given_up=1,
        deadline_misses=1,
        accepted_actions=24,
        replaced_actions=4,
        restarts=1,
        last_refusal="not this one.",
    )
    assert consistent(report)


def test_a_process_that_dies_between_chunks_is_started_again_no_more_often_than_is_allowed() -> None:
    predictor = ProcessPredictor(partial(serve, refuse=-1))
    clock = VirtualClock()
    loop = ControlLoop(settings(restarts=1), Settled(predictor, clock), clock)
    robot = Robot(clock)

    def execute(command: Command) -> None:
        robot.execute(command)
        if command.chunk not in {None, *(each.chunk for each in robot.commands[:-1])}:
            assert predictor.pid is not None
            os.kill(predictor.pid, signal.SIGKILL)
            predictor._process.join()

    report = loop.run(robot.observe, execute, 30)
    # Killed after chunks 0 and 2: requests 1 and 3 find it dead, and the second time what is left is the tail.
    assert robot.story() == "0 1 2 3 4 200 201 202 203 204 205 !"
    assert numbers(report, "requests", "given_up", "restarts", "deadline_misses", "stops") == [4, 2, 1, 2, 1]
    assert report.stopped is not None
    assert "died: killed, or crashed outside of Python" in report.stopped


def make_hanging_then_gated(folder: Path) -> Callable[[Request], np.ndarray]:
    """Return a predictor that hangs on request 1; a process after the first has to wait for a file ``gate``."""
    if (folder / "made").exists():
        until((folder / "gate").exists)
    (folder / "made").touch()
    return partial(hang_on_1, folder / "hangs")


def hang_on_1(hangs: Path, asked: Request) -> np.ndarray:
    if asked.number == 1:
        hangs.touch()
        signal.pause()
    return named_actions(asked)


def test_inference_killed_at_work_is_started_again_by_the_loop_and_no_tick_is_lost(tmp_path: Path) -> None:
    predictor, clock = ProcessPredictor(partial(make_hanging_then_gated, tmp_path)), VirtualClock()
    inference = ThreadInference(predictor, clock)
    loop = ControlLoop(settings(restarts=1, stall_ms=1000.0), inference, clock)
    robot = Robot(clock)

    def play(ticks: int, then: Callable[[], object] = lambda: True) -> None:
        """Play so many ticks, and then wait, in real time, for what a thread or a process does."""
        loop.run(robot.observe, robot.execute, loop.tick + 1 + ticks)
        until(then)

    def answered() -> bool:
        return not inference._worker.answers.empty()

    play(1, answered)
    play(4, (tmp_path / "hangs").exists)  # on request 1, of tick 4
    killed = predictor.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    until(lambda: inference.dead)
    assert inference.dead == f"ProcessDied: inference process {killed} died: killed, or crashed outside of Python"
    # Found dead, given up, and asked again: it loads, and for longer than inference may be silent.
    play(1, lambda: predictor.loading)
    play(24)
    (tmp_path / "gate").touch()
    until(answered)
    play(1, answered)  # chunk 2 is late altogether, and chunk 3 is asked for
    play(3)
    report = loop.report()
    assert predictor.pid != killed
    predictor.close()
    assert [command.tick for command in robot.commands] == list(range(34))
    assert robot.story() == ". 0 1 2 3 4 5" + 24 * " =5" + " 300 301 302"
    assert [each.reason for each in robot.commands[7:31]] == [
        *23 * ["no answer since tick 5"],
        "no answer since tick 30",
    ]
    assert report.counters == LoopCounters(
        ticks=34,
        executed=9,
        held=24,
        waited=1,
        tail=1,
        requests=4,
        accepted=3,
        given_up=1,
        deadline_misses=2,
        accepted_actions=18,
        late_actions=6,
        restarts=1,
    )
    assert consistent(report)


def hang(asked: Request) -> np.ndarray:
    if asked.number == 0:
        signal.pause()
    return named_actions(asked)


def make_hanging() -> Callable[[Request], np.ndarray]:
    return hang


def test_a_process_that_hangs_is_killed_by_the_next_request_whose_answer_is_its_own() -> None:
    predictor = ProcessPredictor(make_hanging)
    left_behind: list[BaseException] = []
    loading_while_closed: list[bool] = []
    close = predictor.close
    predictor.close = lambda: loading_while_closed.append(predictor.loading) or close()  # type: ignore[method-assign]

    def predict(asked: Request) -> np.ndarray:
        try:
            return predictor(asked)
        except ProcessDied as died:
            left_behind.append(died)
            raise

    inference = ThreadInference(predict, VirtualClock())
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
    assert str(left_behind[0]) == f"inference process {hanging} died: killed, or crashed outside of Python"
    inference.submit(request(2))
    assert answer_from(inference).request.number == 2
    # However long the one that hung takes to end, the next one has not been silent meanwhile.
    assert loading_while_closed
    assert all(loading_while_closed)
    close()


def die(_: Request) -> np.ndarray:
    os._exit(1)


def test_a_process_that_dies_at_work_says_so() -> None:
    predictor = ProcessPredictor(make_dying)
    with pytest.raises(ProcessDied, match=r"^inference process \d+ died: killed, or crashed outside of Python$"):
        predictor(request())
    predictor.close()


def make_dying() -> Callable[[Request], np.ndarray]:
    return die


def break_on_1(asked: Request) -> np.ndarray:
    if asked.number == 1:
        raise RuntimeError("broken")
    return named_actions(asked)


def make_breaking(path: Path) -> Callable[[Request], np.ndarray]:
    if not path.exists():
        path.touch()
        raise FileNotFoundError("no weights")
    return break_on_1


def test_a_process_tells_which_exception_it_died_of_and_is_started_again(tmp_path: Path) -> None:
    predictor = ProcessPredictor(partial(make_breaking, tmp_path / "tried"))
    with pytest.raises(
        ProcessDied, match=r"^inference process \d+ died while it loaded: FileNotFoundError: no weights$"
    ):
        predictor.start()
    assert predictor(request(0))[0] == 0
    with pytest.raises(ProcessDied, match=rf"^inference process {predictor.pid} died: RuntimeError: broken$"):
        predictor(request(1))
    assert predictor(request(2))[0] == 200
    predictor.close()


def test_a_process_that_loads_for_ever_is_killed_and_said_to_be(tmp_path: Path) -> None:
    never = tmp_path / "weights"
    predictor = ProcessPredictor(partial(make_when_there, never), load_s=0.01)
    with pytest.raises(ProcessDied, match=r"^inference process \d+ died while it loaded: killed after 0\.01 s$"):
        predictor.start()
    assert not predictor.loading
    assert not predictor._process.is_alive()
    for load_s in (0.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match=r"^load_s: expected finite seconds above 0, got"):
            ProcessPredictor(make_hanging, load_s)


def make_when_there(path: Path) -> Callable[[Request], np.ndarray]:
    until(path.exists)
    return named_actions


def test_a_process_may_load_for_longer_than_inference_may_be_silent(tmp_path: Path) -> None:
    predictor = ProcessPredictor(partial(make_when_there, tmp_path / "weights"))
    clock = VirtualClock()
    inference = ThreadInference(predictor, clock)
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

    inference = ThreadInference(predict, VirtualClock())
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


def test_what_cannot_be_sent_to_a_process_says_so_every_time() -> None:
    predictor = ProcessPredictor(lambda: named_actions)
    for _ in range(2):
        with pytest.raises((AttributeError, PicklingError), match=r"[Cc]an't (get|pickle) local object"):
            predictor.start()
        predictor.close()
    assert (predictor.pid, predictor.loading) == (None, False)


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
    with pytest.raises(ProcessDied, match=r"^inference process \d+ died while it loaded: killed, or crashed outside"):
        predictor.start()
    assert not predictor.loading
    assert predictor(request(1))[0] == 100
    predictor.close()


def make_once(path: Path) -> Callable[[Request], np.ndarray]:
    if not path.exists():
        path.touch()
        os._exit(1)
    return named_actions
