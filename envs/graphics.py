"""Which OpenGL MuJoCo draws with where there is no screen: EGL, else OSMesa, else none."""

from __future__ import annotations

import ctypes
import os
import sys

from envs.errors import EnvError

_NO_DRAWING = "glx"
"""robosuite imports with it where neither library is, as it wants a library only once it draws."""

_EGL_PLATFORM_DEVICE = 0x313F
_MOST_DEVICES = 16


def choose_graphics() -> None:
    """Set ``MUJOCO_GL`` unless it is set; must happen before mujoco is imported, which reads it once."""
    if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        os.environ["MUJOCO_GL"] = "egl" if _egl_works() else "osmesa" if _loads("libOSMesa.so.8") else _NO_DRAWING


def require_graphics() -> None:
    """Refuse where nothing can draw.

    Raises:
        EnvError: neither EGL nor OSMesa was found, and there is no screen.
    """
    if os.environ.get("MUJOCO_GL") == _NO_DRAWING and not os.environ.get("DISPLAY"):
        raise EnvError(
            "rendering: expected a working EGL or OSMesa library, got neither; "
            "install one (apt-get install libegl1 libosmesa6), or give video=0 and a task without images."
        )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _egl_works() -> bool:
    """Open a display as MuJoCo will: the library alone says nothing about a driver behind it."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    query, display_of = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not display_of:
        return False
    devices, count = (ctypes.c_void_p * _MOST_DEVICES)(), ctypes.c_int()
    query_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int)
    )(query)
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    query_devices(_MOST_DEVICES, devices, ctypes.byref(count))
    displays = [get_display(_EGL_PLATFORM_DEVICE, device, None) for device in devices[: count.value]]
    return any(display and egl.eglInitialize(ctypes.c_void_p(display), None, None) for display in displays)
