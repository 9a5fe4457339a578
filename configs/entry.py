"""From command line to typed object: what every script's ``main`` is wrapped in."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from bac.errors import BacError, InvalidInput, sentence
from configs.store import register
from envs.errors import EnvError

_Config = TypeVar("_Config")


def script(name: str, config_type: type[_Config]) -> Callable[[Callable[[_Config, Path], object]], Callable[[], None]]:
    """Turn ``main(config, folder)`` into a command: composed, typed, with a result folder of its own.

    A refusal of ours ends the process with status 1 and its one sentence on standard error.
    """

    def decorate(main: Callable[[_Config, Path], object]) -> Callable[[], None]:
        @hydra.main(version_base="1.3", config_path=str(Path(__file__).parent), config_name=name)
        def command(composed: DictConfig) -> object:
            try:
                config = _complete(composed)
                assert isinstance(config, config_type)  # the YAML's first default is the schema
                return main(config, Path(HydraConfig.get().runtime.output_dir))
            except (BacError, EnvError) as error:
                sys.exit(f"error: {error}")

        register()
        return command

    return decorate


def _complete(composed: DictConfig) -> object:
    """Return the typed configuration.

    Raises:
        InvalidInput: a value that has no default was not given.
    """
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        given = " ".join(f"{key}=VALUE" for key in missing)
        raise InvalidInput(
            sentence("configuration", expected=f"{', '.join(missing)}", got="none", mend=f"give {given}")
        )
    return OmegaConf.to_object(composed)
