"""A script's configuration as its command line would make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs import schema
from configs.store import register

FOLDER = Path(schema.__file__).parent


def composed(script: str, *overrides: str) -> Any:
    """Return the typed configuration of ``scripts/<script>.py``."""
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        return OmegaConf.to_object(compose(script, list(overrides)))
