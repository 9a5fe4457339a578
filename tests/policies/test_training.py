from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bac.errors import CorruptArtefact, InvalidInput, Mismatch
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig
from policies.samplers import DiffusionProcess
from policies.training import LOG_FILE, STATE_FILE, Trainer, TrainingConfig, TrainingWindows
from policies.training_identity import training_identity
from tests.policies.networks import small_checkpoint
from tests.policies.resuming import require_exact_resume, weights

RECIPE = TrainingConfig(
    cycles=(8,),
    batch_size=16,
    learning_rate=3e-3,
    warmup_steps=2,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    gradient_clip=1.0,
    ema_power=0.75,
    precision="fp32",
    seed=3,
)


IDENTITY = {"policy": "0a", "actions": "1b"}


def _trainer(
    folder: Path,
    config: TrainingConfig = RECIPE,
    identity: Mapping[str, str] = IDENTITY,
    width: int = 16,
    dropout: float = 0.1,
) -> Trainer:
    torch.manual_seed(0)
    # Dropout on: resuming must restore its randomness, too.
    sizes = DiffusionTransformerConfig(
        action_dim=2,
        observation_dim=3,
        horizon=4,
        observation_steps=2,
        layers=1,
        heads=2,
        width=width,
        attention_dropout=dropout,
    )
    frames = torch.linspace(-1, 1, 40)
    index = torch.arange(36)[:, None] + torch.arange(4)
    windows = TrainingWindows(frames[:, None].expand(-1, 3), torch.stack([frames, -frames], dim=1), index, 2)
    alphas = torch.from_numpy(DiffusionProcess(10).alphas_cumprod())
    return Trainer(DiffusionTransformer(sizes), windows, alphas, config, folder, identity)


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    require_exact_resume(_trainer, tmp_path, saved=5, killed=7)


def test_bf16_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    bf16 = replace(RECIPE, precision="bf16")
    whole = require_exact_resume(lambda folder: _trainer(folder, bf16), tmp_path, saved=5, killed=7)
    assert weights(whole).dtype == torch.float32


class _Products(TorchDispatchMode):
    """Notes the operators that are called, and the types of what ``addmm`` multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        if func.overloadpacket.__name__ == "addmm":
            self.types.add(args[1].dtype)
        return func(*args, **(kwargs or {}))


def test_bf16_multiplies_in_bf16_and_leaves_fused_attention_alone(tmp_path: Path) -> None:
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    losses, products = {}, {}
    for precision in ("fp32", "bf16"):
        with _Products() as products[precision]:
            # With dropout, attention is never fused on a CPU.
            trainer = _trainer(tmp_path / precision, replace(RECIPE, precision=precision), dropout=0.0)
            losses[precision] = next(iter(trainer.run())).loss
    assert fused in products["fp32"].names
    assert fused not in products["bf16"].names
    assert products["fp32"].types == {torch.float32}
    assert products["bf16"].types == {torch.bfloat16}
    # bf16 keeps 8 bits of a number: 0.4 % of a prediction of unit size.
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


def test_loss_falls_and_weights_average(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, replace(RECIPE, cycles=(150,)))
    losses = [progress.loss for progress in trainer.run()]
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    assert not torch.equal(
        weights(trainer)[: len(weights(trainer)) // 2], weights(trainer)[len(weights(trainer)) // 2 :]
    )


def test_rate_warms_up_and_falls_to_zero(tmp_path: Path) -> None:
    rates = [progress.learning_rate for progress in _trainer(tmp_path).run()]
    assert rates[:3] == pytest.approx([1.5e-3, 3e-3, 3e-3])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] < 0.1 * RECIPE.learning_rate


def test_each_cycle_warms_up_again(tmp_path: Path) -> None:
    recipe = replace(RECIPE, cycles=(8, 5))
    rates = [recipe.rate(step) for step in range(recipe.steps)]
    assert rates[:8] == [RECIPE.rate(step) for step in range(8)]
    assert rates[8:] == [replace(RECIPE, cycles=(5,)).rate(step) for step in range(5)]


def test_finished_run_continues_with_another_cycle(tmp_path: Path) -> None:
    longer = replace(RECIPE, cycles=(8, 5))
    whole = _trainer(tmp_path / "whole", longer)
    list(whole.run())

    finished = _trainer(tmp_path / "finished")
    list(finished.run())
    finished.save()
    continued = _trainer(tmp_path / "finished", longer)
    assert continued.resume()
    assert [progress.step for progress in continued.run()] == [9, 10, 11, 12, 13]
    assert torch.equal(weights(continued), weights(whole))


def test_ema_starts_at_the_weights_and_then_lags(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    next(iter(trainer.run()))
    # decay(0) = 1 - 1 ** -0.75 = 0: after the first step the average is the network.
    for averaged, current in zip(trainer.ema.parameters(), trainer.network.parameters(), strict=True):
        assert torch.equal(averaged, current)


def test_windows_of_an_epoch_are_all_different(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    epoch = torch.cat([trainer._window_numbers(step) for step in range(2)])
    assert len(epoch.unique()) == len(epoch) == 32
    assert not torch.equal(trainer._window_numbers(0), trainer._window_numbers(2))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not _trainer(tmp_path).resume()


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"cycles": (9,)}, {"cycles": (4,)}, {"seed": 4}])
def test_another_recipe_refuses(tmp_path: Path, change: dict[str, Any]) -> None:
    trainer = _trainer(tmp_path)
    list(trainer.run(until=5))
    trainer.save()
    with pytest.raises(Mismatch, match="training state"):
        _trainer(tmp_path, replace(RECIPE, **change)).resume()


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"policy": "0a", "actions": "2c"}, "another actions"),
        ({"policy": "1a", "actions": "1b", "image": "3d"}, "another policy, image"),
    ],
)
def test_other_data_or_policy_refuses(tmp_path: Path, saved: dict[str, str], told: str) -> None:
    trainer = _trainer(tmp_path, identity=saved)
    list(trainer.run())
    trainer.save()
    with pytest.raises(Mismatch, match=rf"training state .*: expected the data, .* got {told}; give the same task"):
        _trainer(tmp_path).resume()


def _edit_state(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(folder / STATE_FILE, weights_only=True)
    edit(state)
    torch.save(state, folder / STATE_FILE)


def test_another_type_of_device_refuses(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.save()
    _edit_state(tmp_path, lambda state: state["identity"].update({"device type": "cuda"}))
    with pytest.raises(Mismatch, match="got another device type; give"):
        _trainer(tmp_path).resume()


def test_state_without_an_identity_resumes_where_the_weights_fit(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    list(trainer.run(until=5))
    trainer.save()
    _edit_state(tmp_path, lambda state: state.pop("identity"))
    resumed = _trainer(tmp_path)
    assert resumed.resume()
    assert resumed.step == 5
    assert torch.equal(weights(resumed), weights(trainer))
    with pytest.raises(Mismatch, match="got another network; give"):
        _trainer(tmp_path, width=32).resume()


def test_identity_tells_policy_range_order_and_every_array_apart() -> None:
    spec = small_checkpoint().spec
    arrays = {"keypoints": np.zeros((4, 3), np.float32), "image": np.zeros((4, 6, 6, 3), np.uint8)}
    first = training_identity(spec, 1e-4, arrays)
    assert training_identity(spec, 1e-4, {key: values.copy() for key, values in arrays.items()}) == first

    def changed(other: dict[str, str]) -> list[str]:
        return [name for name in first if first[name] != other[name]]

    image = arrays["image"].copy()
    image[3, 5, 5, 2] = 1
    assert changed(training_identity(spec, 1e-4, arrays | {"image": image})) == ["image"]
    assert changed(training_identity(spec, 1e-4, arrays | {"keypoints": np.zeros((3, 4), np.float32)})) == ["keypoints"]
    assert changed(training_identity(spec, 1e-2, arrays)) == ["least_range"]
    backwards = dict(reversed(spec.observation.items()))
    heads = replace(spec.network, heads=4)
    for other in (replace(spec, observation=backwards), replace(spec, network=heads), replace(spec, action_steps=3)):
        assert changed(training_identity(other, 1e-4, arrays)) == ["policy"]


def test_truncated_state_refuses(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    trainer.save()
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptArtefact, match="delete it to start again"):
        _trainer(tmp_path).resume()


def test_state_of_another_version_refuses(tmp_path: Path) -> None:
    torch.save({"step": 1, "config": {"steps": 8}}, tmp_path / STATE_FILE)
    with pytest.raises(CorruptArtefact, match="expected a whole file of this version"):
        _trainer(tmp_path).resume()


def test_log_has_losses_and_scores(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, replace(RECIPE, cycles=(40,)))
    list(trainer.run())
    trainer.note_score(0.5)
    trainer.save()
    header, *rows = (tmp_path / LOG_FILE).read_text().splitlines()
    assert header == "step,loss,learning_rate,seconds,score"
    assert [row.split(",")[0] for row in rows] == ["20", "40", "40"]
    assert rows[-1].endswith(",0.5")


def test_diverged_loss_refuses(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path)
    with torch.no_grad():
        trainer.network.head.bias.fill_(torch.inf)
    with pytest.raises(InvalidInput, match="loss at step 0"):
        next(iter(trainer.run()))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("warmup_steps", 8),
        ("batch_size", 0),
        ("noise_draws", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("encoder_weight_decay", -0.1),
        ("betas", (0.9,)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("gradient_clip", 0.0),
        ("gradient_clip", -1.0),
        ("ema_power", 0.0),
        ("precision", "fp8"),
    ],
)
def test_impossible_recipe_refuses(name: str, given: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"^optimiser\.{name}: expected .*, got .*; correct it\.$"):
        replace(RECIPE, **{name: given})
    with pytest.raises(InvalidInput, match=r"^optimiser\.warmup_steps: expected 0 to below each cycle of \[\], got 2"):
        replace(RECIPE, cycles=())


def test_noise_draws_repeat_the_batch(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, replace(RECIPE, batch_size=4, noise_draws=3))
    given: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    trainer.network.register_forward_pre_hook(lambda _, asked: given.append(asked))
    next(trainer.run())
    sample, timestep, condition = given[0]
    assert (len(sample), len(timestep)) == (12, 12)
    assert torch.equal(condition, condition[:4].repeat(3, 1, 1))
    assert len(sample.flatten(1).unique(dim=0)) == 12


def test_scaled_condition_changes_how_large_an_observation_is_and_nothing_else(tmp_path: Path) -> None:
    observed = torch.rand(500, 3) * 2 - 1
    sizes, others = [], []
    for scaled in (False, True):
        trainer = _trainer(tmp_path, replace(RECIPE, scaled_condition=scaled))
        network = trainer.network
        assert isinstance(network, DiffusionTransformer)
        with torch.no_grad():
            sizes.append(network.encoder[0](network.cond_obs_emb(observed)).std(0).mean().item())
        state = network.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in trainer.ema.state_dict().items())
        drawn = {"cond_obs_emb.weight", "encoder.0.weight", "encoder.2.weight"}
        others.append({name: value for name, value in state.items() if name not in drawn})
    # Mish bends where its argument is about 1.
    assert sizes[0] < 0.02
    assert 0.3 < sizes[1] < 3
    assert all(torch.equal(value, others[1][name]) for name, value in others[0].items())


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    losses = [progress.loss for progress in _trainer(tmp_path, replace(RECIPE, precision="bf16")).run()]
    exact = [progress.loss for progress in _trainer(tmp_path / "exact").run()]
    assert losses != exact
    # bf16 keeps 8 bits; the loss is about 1.
    assert losses == pytest.approx(exact, rel=0.03)
