"""Each piece of hygiene is asked for in a process of its own, so that the tests' stays as it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bac.control.process import Hygiene
from bac.errors import InvalidInput

REFUSED = "[Errno 1] Operation not permitted"


def asked(options: str, after: str = "None") -> tuple[dict[str, str], object]:
    code = (
        "import gc, json, os; from bac.control.process import Hygiene; "
        f"report = Hygiene({options}).apply(); print(json.dumps([report, {after}]))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return tuple(json.loads(told.stdout))


def test_nothing_is_asked_for_unless_wanted() -> None:
    assert Hygiene().apply() == {}


def test_cores_and_garbage_collection_are_set_and_the_rest_is_told() -> None:
    report, (cores, frozen, enabled, switch_s) = asked(
        "cores=[0], torch_threads=1, freeze_gc=True, lock_memory=True, switch_interval_ms=0.5, priority=10",
        "[sorted(os.sched_getaffinity(0)), gc.get_freeze_count() > 0, gc.isenabled(), "
        "__import__('sys').getswitchinterval()]",
    )
    assert list(report) == ["cores", "torch_threads", "freeze_gc", "lock_memory", "switch_interval_ms", "priority"]
    assert (report["switch_interval_ms"], switch_s) == ("done", 0.0005)
    assert (report["cores"], cores) == ("done", [0])
    assert (report["freeze_gc"], frozen, enabled) == ("done", True, False)
    assert report["torch_threads"] == "torch is not loaded"
    # Rights that this process may or may not have; locking tells more than one reason.
    assert report["priority"] in {"done", REFUSED}
    assert report["lock_memory"] == "done" or "emory" in report["lock_memory"] or "permitted" in report["lock_memory"]


def test_what_was_granted_is_given_back_and_what_was_refused_is_not() -> None:
    code = (
        "import gc, json, os, sys; from bac.control.process import Hygiene; "
        "state = lambda: [sorted(os.sched_getaffinity(0)), gc.get_freeze_count() > 0, gc.isenabled(), "
        "sys.getswitchinterval(), os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK]\n"
        "before = state()\n"
        "with Hygiene(cores=[max(before[0])], freeze_gc=True, lock_memory=True, switch_interval_ms=0.5, priority=1)"
        ".applied() as report: during = state()\n"
        "gc.disable()\n"
        "with Hygiene(cores=[100000], freeze_gc=True).applied() as refused: pass\n"
        "print(json.dumps([report, before, during, state(), refused]))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report, before, during, after, refused = json.loads(told.stdout)
    assert during == [[max(before[0])], True, False, 0.0005, 1 if report["priority"] == "done" else 0]
    # Whoever had switched collection off finds it off.
    assert after == [before[0], False, False, 0.005, 0]
    assert before[1:] == [False, True, 0.005, 0]
    assert "nvalid argument" in refused["cores"]
    assert refused["freeze_gc"] == "done"


def test_what_the_system_refuses_is_a_sentence_and_no_error() -> None:
    for cores, told in (("[100000]", "nvalid argument"), ("[-1]", "egative"), ("[10**12]", "arge")):
        report, _ = asked(f"cores={cores}")
        assert told in report["cores"]


@pytest.mark.parametrize(
    "options", [{"cores": []}, {"torch_threads": 0}, {"priority": 0}, {"priority": 100}, {"switch_interval_ms": 0}]
)
def test_impossible_wishes_refuse(options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=r"^process hygiene: expected cores, torch_threads of at least 1"):
        Hygiene(**options)


def test_a_priority_stays_with_the_thread_that_asked() -> None:
    started = (
        "(lambda found: ([t := __import__('threading').Thread(target=lambda: found.append(os.sched_getscheduler(0))), "
        "t.start(), t.join()], found[0])[1])([])"
    )
    report, policy = asked("priority=1", started)
    if report["priority"] == REFUSED:
        pytest.skip("this process may not ask for a priority")
    assert (report["priority"], policy) == ("done", 0)  # SCHED_OTHER
