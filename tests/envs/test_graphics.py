"""Which library draws, without any of them: the choice is a matter of what can be loaded."""

import ctypes
import os

import pytest

from envs import graphics
from envs.errors import EnvError


@pytest.mark.parametrize(
    ("egl", "libraries", "chosen"),
    [
        (True, {"libOSMesa.so.8"}, "egl"),
        (False, {"libOSMesa.so.8"}, "osmesa"),
        (False, set(), "glx"),
    ],
)
def test_egl_is_preferred_and_osmesa_stands_in(
    egl: bool, libraries: set[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(graphics.sys, "platform", "linux")
    monkeypatch.setattr(graphics, "_egl_works", lambda: egl)
    monkeypatch.setattr(graphics, "_loads", lambda library: library in libraries)
    graphics.choose_graphics()
    assert os.environ["MUJOCO_GL"] == chosen
    if chosen == "glx":
        with pytest.raises(
            EnvError, match=r"^rendering: expected a working EGL or OSMesa library, got neither; install"
        ):
            graphics.require_graphics()
    else:
        graphics.require_graphics()


def test_choice_of_the_user_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(graphics, "_egl_works", lambda: True)
    graphics.choose_graphics()
    assert os.environ["MUJOCO_GL"] == "osmesa"


def test_library_that_is_missing_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not graphics._loads("libNoSuchThing.so.8")
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load("libNoSuchThing.so.8"))
    assert not graphics._egl_works()
