"""A diffusion sampler as a table of coefficients, so that a plan needs no scheduler object in its loop.

Step 0 is the noisiest. With ``x`` the sample, ``e`` the noise estimate, ``z`` fresh unit noise and ``y0`` the x0 of the
step before (0 at step 0), step k is::

    x0 = clip(recover_sample[k] * x + recover_estimate[k] * e)
    x  = to_original[k] * x0 + to_sample[k] * x + to_estimate[k] * e + to_noise[k] * z + to_previous[k] * y0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from bac.errors import InvalidInput, sentence


@dataclass(frozen=True)
class SamplerTable:
    """K denoising steps.

    Attributes:
        identity: what makes this sampler this sampler (name, steps, noise schedule, ...); schedules and profiles carry
            it and refuse any other.
        timesteps: int64[K], the network's time step at each denoising step, decreasing.
        recover_sample, recover_estimate: float64[K], give the estimate x0 of the clean chunk.
        to_original, to_sample, to_estimate, to_noise: float64[K], give the next sample.
        to_previous: float64[K], likewise; not 0 in multistep samplers alone, and 0 at step 0.
        clip: bound of x0 in normalised units, at least 0.
    """

    identity: Mapping[str, str | int | float]
    timesteps: np.ndarray
    recover_sample: np.ndarray
    recover_estimate: np.ndarray
    to_original: np.ndarray
    to_sample: np.ndarray
    to_estimate: np.ndarray
    to_noise: np.ndarray
    to_previous: np.ndarray
    clip: float

    def __post_init__(self) -> None:
        columns = [value for field, value in vars(self).items() if field.startswith(("recover_", "to_"))]
        whole = all(c.shape == self.timesteps.shape and np.isfinite(c).all() for c in columns)
        whole = whole and self.timesteps.size > 0 and self.to_previous[0] == 0
        if not whole or (np.diff(self.timesteps) >= 0).any():
            raise InvalidInput(
                sentence(
                    f"sampler table {dict(self.identity)}",
                    expected="finite columns of one length, decreasing time steps and nothing before the first",
                    got=f"time steps {self.timesteps.tolist()}",
                    mend="correct the sampler's parameters",
                )
            )
        object.__setattr__(self, "identity", MappingProxyType(dict(self.identity)))

    @property
    def steps(self) -> int:
        """Number of denoising steps K."""
        return len(self.timesteps)

    @property
    def name(self) -> str:
        """Short name, for instance ``ddpm-100`` or ``ddim-10-trailing``; file names use it."""
        parts = (self.identity[key] for key in ("name", "steps", "spacing") if key in self.identity)
        return "-".join(map(str, parts))
