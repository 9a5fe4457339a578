"""robomimic and robosuite as this project imports them: silent, without a screen, without the retired mujoco_py."""

from __future__ import annotations

import logging
import sys
from types import ModuleType

from envs.errors import EnvError
from envs.graphics import choose_graphics
from envs.robomimic_tasks import TASKS

__all__ = [
    "ROBOSUITE_VERSION",
    "EnvRobosuite",
    "EnvType",
    "SequenceDataset",
    "SimulationFault",
    "draw_offscreen",
    "h5py",
]


def _stand_in_for_mujoco_py(fault: type[Exception]) -> None:
    # robomimic 0.3 imports the retired package for the name of one exception.
    package, builder = ModuleType("mujoco_py"), ModuleType("mujoco_py.builder")
    builder.MujocoException = fault  # type: ignore[attr-defined]
    package.builder = builder  # type: ignore[attr-defined]
    sys.modules.setdefault("mujoco_py", package)
    sys.modules.setdefault("mujoco_py.builder", builder)


choose_graphics()
# robosuite asks, in three lines, for a private file of settings, and PyOpenGL for a package that nothing here needs.
logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
logging.getLogger("OpenGL.acceleratesupport").setLevel(logging.WARNING)
try:
    import h5py
    from mujoco import FatalError as SimulationFault

    _stand_in_for_mujoco_py(SimulationFault)
    import robomimic.utils.obs_utils
    from robomimic.envs.env_base import EnvType
    from robomimic.envs.env_robosuite import EnvRobosuite
    from robomimic.utils.dataset import SequenceDataset
    from robosuite import __version__ as ROBOSUITE_VERSION  # noqa: N812
    from robosuite.utils.binding_utils import MjRenderContextOffscreen as draw_offscreen  # noqa: N813
except ModuleNotFoundError as error:
    raise EnvError(
        f"robomimic tasks: expected the packages robomimic, robosuite and mujoco, got no {error.name}; "
        "install them with pip install -e '.[robomimic]'."
    ) from error

# robomimic keeps what is an image in a table of the process; without it no observation can be made.
robomimic.utils.obs_utils.initialize_obs_modality_mapping_from_dict(
    {
        "low_dim": sorted({key for task in TASKS.values() for key in task.low_dim}),
        "rgb": sorted({key for task in TASKS.values() for key in task.images}),
    }
)
