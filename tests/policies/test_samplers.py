"""Every sampler table against diffusers' scheduler, step by step, on the same noise estimates and the same noise."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_ddpm

from bac.errors import CorruptArtefact, InvalidInput, Mismatch
from bac.sampler_table import SamplerTable
from policies.samplers import DiffusionProcess, Spacing, ddim, ddpm, dpm_solver, sampler_named

PROCESS = DiffusionProcess(100)
# diffusers keeps its coefficients in float32, ours are float64 rounded once; x0 divides by sqrt(alpha) down to 0.02.
TOLERANCE = 1e-5


def _step(
    table: SamplerTable, k: int, sample: torch.Tensor, estimate: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    original = (table.recover_sample[k] * sample + table.recover_estimate[k] * estimate).clamp(-table.clip, table.clip)
    kept = table.to_sample[k] * sample + table.to_estimate[k] * estimate
    return table.to_original[k] * original + kept + table.to_noise[k] * noise


@pytest.mark.parametrize("steps", [100, 50, 20, 10])
def test_ddpm_equals_diffusers(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=True)
    scheduler.set_timesteps(steps)
    table = ddpm(PROCESS, steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(steps)
    ours = theirs = torch.randn(3, 6, 2, generator=generator)
    for k, timestep in enumerate(scheduler.timesteps):
        estimate, noise = (torch.randn(3, 6, 2, generator=generator) for _ in range(2))
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, drawn=noise, **__: drawn)
        theirs = scheduler.step(estimate, timestep, theirs).prev_sample
        ours = _step(table, k, ours, estimate, noise).float()
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", list(Spacing))
@pytest.mark.parametrize("steps", [100, 50, 16, 10, 5])
def test_ddim_equals_diffusers(steps: int, spacing: Spacing) -> None:
    scheduler = DDIMScheduler(
        100, beta_schedule="squaredcos_cap_v2", clip_sample=True, set_alpha_to_one=True, timestep_spacing=str(spacing)
    )
    scheduler.set_timesteps(steps)
    table = ddim(PROCESS, steps, spacing)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(steps)
    ours = theirs = torch.randn(3, 6, 2, generator=generator)
    for k, timestep in enumerate(scheduler.timesteps):
        estimate = torch.randn(3, 6, 2, generator=generator)
        theirs = scheduler.step(estimate, timestep, theirs).prev_sample
        ours = _step(table, k, ours, estimate, torch.full_like(ours, torch.inf).nan_to_num(posinf=1e9)).float()
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("steps", [100, 20, 10, 5, 2, 1])
def test_dpm_solver_equals_diffusers(steps: int) -> None:
    # Thresholding by the largest value, bounded by 1, is clipping to 1.
    clipping = {"thresholding": True, "dynamic_thresholding_ratio": 1.0, "sample_max_value": 1.0}
    scheduler = DPMSolverMultistepScheduler(
        100, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **clipping
    )
    scheduler.set_timesteps(steps)
    table = dpm_solver(PROCESS, steps)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    generator = torch.Generator().manual_seed(steps)
    ours = theirs = torch.randn(3, 6, 2, generator=generator)
    previous = torch.zeros_like(ours)
    for k, timestep in enumerate(scheduler.timesteps):
        estimate = torch.randn(3, 6, 2, generator=generator)
        theirs = scheduler.step(estimate, timestep, theirs).prev_sample
        original = (table.recover_sample[k] * ours + table.recover_estimate[k] * estimate).clamp(-1, 1)
        ours = _step(table, k, ours, estimate, torch.zeros_like(ours)) + table.to_previous[k] * previous
        ours, previous = ours.float(), original
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_forward_process_equals_diffusers() -> None:
    theirs = DDPMScheduler(100, beta_schedule="squaredcos_cap_v2").alphas_cumprod.numpy()
    np.testing.assert_allclose(PROCESS.alphas_cumprod(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [0, 101, -1])
def test_step_count_out_of_range_refuses(steps: int) -> None:
    for sampler in (ddpm, ddim, dpm_solver):
        with pytest.raises(InvalidInput, match=r"sampler\.steps: expected 1 to 100"):
            sampler(PROCESS, steps)


def test_identity_tells_samplers_apart() -> None:
    tables = [ddpm(PROCESS), ddpm(PROCESS, 50), ddim(PROCESS, 50), ddim(PROCESS, 50, Spacing.LEADING)]
    tables += [ddpm(DiffusionProcess(100, clip=2.0)), dpm_solver(PROCESS, 50)]
    assert len({tuple(sorted(table.identity.items())) for table in tables}) == len(tables)
    assert [table.name for table in tables[:4]] == ["ddpm-100", "ddpm-50", "ddim-50-trailing", "ddim-50-leading"]


def test_identity_names_the_sampler() -> None:
    for table in (ddpm(PROCESS), ddpm(PROCESS, 50), ddim(PROCESS, 16, Spacing.LEADING), dpm_solver(PROCESS, 10)):
        again = sampler_named(PROCESS, json.loads(json.dumps(dict(table.identity))))
        assert (again.name, again.identity) == (table.name, table.identity)
        np.testing.assert_array_equal(again.timesteps, table.timesteps)


def test_identity_of_no_sampler_or_another_process_refuses() -> None:
    known = dict(ddim(PROCESS, 16).identity)
    for wrong in ({}, known | {"name": "euler"}, known | {"spacing": "linspace"}, known | {"steps": "ten"}):
        with pytest.raises(CorruptArtefact, match=r"^sampler: expected one of ours, got \{"):
            sampler_named(PROCESS, wrong)
    with pytest.raises(Mismatch, match=r"^sampler: expected \{.*\} of this checkpoint, got"):
        sampler_named(DiffusionProcess(100, clip=2.0), known)


@pytest.mark.parametrize("field", ["recover_sample", "to_noise"])
def test_table_with_nan_refuses(field: str) -> None:
    columns = {name: getattr(ddpm(PROCESS), name) for name in SamplerTable.__dataclass_fields__}
    columns[field] = np.full(100, np.nan)
    with pytest.raises(InvalidInput, match="finite columns"):
        SamplerTable(**columns)
