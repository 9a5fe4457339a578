"""Every YAML composes into its typed object, and a wrong override is refused with the full key."""

import re
import shlex
from dataclasses import asdict

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from bac.errors import InvalidInput
from bac.executors import ExecutorKind
from bac.methods import BlockAdaptive, LastStep, Uniform
from bac.profile import FeatureProfile
from bac.schedule import Provenance
from bac.trunk import Block, BlockKind
from configs import schema, tasks
from configs.budgets import LatencyBudgetConfig
from configs.methods import METHODS, default_method
from configs.store import register
from configs.studies import BenchConfig
from configs.tasks import TaskDemonstrations, demonstrations, environment
from envs.errors import EnvError
from envs.robomimic_tasks import RATE_HZ, TASKS
from policies.samplers import DiffusionProcess
from policies.training import TrainingConfig
from policies.vision import VisionConfig
from tests.composing import FOLDER, composed

SCRIPTS = {
    "eval": (schema.EvalConfig, []),
    "export": (schema.ExportConfig, []),
    "calibrate": (schema.CalibrateConfig, []),
    "latency_budget": (LatencyBudgetConfig, ["budget_ms=80"]),
    "train": (schema.TrainConfig, []),
    "make_demos": (schema.MakeDemosConfig, []),
    "bench": (BenchConfig, []),
    "report": (schema.ReportConfig, []),
    "import_checkpoint": (schema.ImportConfig, ["source=a.ckpt", "weights=ema"]),
    "compare": (schema.CompareConfig, ["reference=a", "runs=[b]"]),
}
GROUPS = {path.parent.name: [] for path in FOLDER.glob("*/*.yaml")}
for path in FOLDER.glob("*/*.yaml"):
    GROUPS[path.parent.name].append(path.stem)


def _compose(name: str, *overrides: str) -> object:
    return composed(name, *SCRIPTS[name][1], *overrides)


def test_every_script_yaml_is_known_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(SCRIPTS)
    assert {path.stem for path in (FOLDER.parent / "scripts").glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "train"])
def test_script_yaml_composes(name: str) -> None:
    assert isinstance(_compose(name), SCRIPTS[name][0])


def test_runs_of_one_second_have_folders_of_their_own() -> None:
    register()
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        hydra = compose("eval", return_hydra_config=True).hydra
        # Microseconds.
        assert all(re.search(r"_\d\d-\d\d-\d\d-\d{6}$", folder) for folder in (hydra.run.dir, hydra.sweep.dir))


def test_the_command_in_the_file_gives_a_name_with_an_equals_sign() -> None:
    line = (FOLDER / "import_checkpoint.yaml").read_text().splitlines()[0].removeprefix("# ").split("  ")[0]
    script, *overrides = shlex.split(line)[1:]
    assert script == "scripts/import_checkpoint.py"
    assert _compose("import_checkpoint", *overrides).source == "epoch=4850.ckpt"
    readme = shlex.split(re.search(r"`('checkpoint=.*?')`", (FOLDER.parent / "README.md").read_text())[1])
    assert _compose("eval", *readme).checkpoint == "epoch=4850.ckpt"


def test_enough_calls_for_a_99th_percentile() -> None:
    assert _compose("eval").latency_calls >= 100


@pytest.mark.parametrize("cache", GROUPS["cache"])
@pytest.mark.parametrize("sampler", GROUPS["sampler"])
@pytest.mark.parametrize("task", [task for task in GROUPS["task"] if not task.endswith("_image")])
def test_every_choice_composes_and_builds(cache: str, sampler: str, task: str) -> None:
    config = _compose("eval", f"cache={cache}", f"sampler={sampler}", f"task={task}")
    assert config.cache.build().name == cache
    assert config.sampler.build(DiffusionProcess(100)).identity["name"] == sampler
    assert config.task.name == task


@pytest.mark.parametrize("executor", GROUPS["executor"])
def test_every_executor_composes(executor: str) -> None:
    assert _compose("eval", f"executor={executor}").executor.kind == executor
    assert set(GROUPS["executor"]) == set(ExecutorKind)


def test_defaults_are_the_papers_but_for_the_budget() -> None:
    assert _compose("eval").cache.build() == BlockAdaptive(updates=30)
    assert _compose("eval", "cache.updates=10").cache.build() == BlockAdaptive(
        updates=10, upstream_blocks=5, last_step=LastStep.FORCED
    )
    assert _compose("eval", "cache=uniform", "cache.updates=7").cache.build() == Uniform(updates=7)


def test_first_use_measures_what_calibration_measures() -> None:
    first_use, by_command = asdict(_compose("eval").calibration), asdict(_compose("calibrate"))
    assert first_use == {name: by_command[name] for name in first_use}


def test_every_field_of_a_method_can_be_set() -> None:
    overrides = [
        "updates=3",
        "upstream_blocks=0",
        "metric=l1",
        "score=adjacent",
        "downstream=strict",
        "last_step=free",
    ]
    method = _compose("eval", *(f"cache.{override}" for override in overrides)).cache.build()
    defaults = BlockAdaptive()
    unchanged = [name for name in defaults.__dataclass_fields__ if getattr(method, name) == getattr(defaults, name)]
    assert unchanged == ["name"]


@pytest.mark.parametrize(
    ("script", "override", "told"),
    [
        ("eval", "cache.updatez=3", "cache.updatez"),
        ("eval", "episodez=3", "episodez"),
        ("eval", "episodes=many", "episodes"),
        ("eval", "cache=magic", "magic"),
        ("eval", "task=fold_laundry", "fold_laundry"),
        ("calibrate", "sampler.speed=9", "sampler.speed"),
    ],
)
def test_unknown_override_refuses_with_the_key(script: str, override: str, told: str) -> None:
    with pytest.raises(HydraException, match=told):
        _compose(script, override)


def test_parameter_of_another_method_refuses() -> None:
    with pytest.raises(HydraException, match=r"cache\.upstream_blocks"):
        _compose("eval", "cache=uniform", "cache.upstream_blocks=5")


@pytest.mark.parametrize(
    ("key", "told"),
    [("cache.metric", "cosine, l1, l2, mse"), ("cache.score", "anchor, adjacent"), ("cache.downstream", "strict")],
)
def test_unknown_choice_names_the_known_ones(key: str, told: str) -> None:
    with pytest.raises(InvalidInput, match=f"{key}: expected one of .*{told}"):
        _compose("eval", f"{key}=best").cache.build()


@pytest.mark.parametrize(
    ("script", "override"),
    [("calibrate", "batch=0"), ("calibrate", "router_penalty=-1"), ("eval", "calibration.batch=0")],
)
def test_counts_that_calibration_cannot_have_refuse(script: str, override: str) -> None:
    name, given = override.split(".")[-1].split("=")
    with pytest.raises(InvalidInput, match=rf"^calibration, {name}: expected at least [01], got {given}(\.0)?; cor"):
        _compose(script, override)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"none", "search"}))
def test_no_method_refuses_the_profile_that_stands_in(name: str) -> None:
    blocks = tuple(Block(layer, kind) for layer in range(8) for kind in BlockKind)
    provenance = Provenance("c", {"name": "ddpm", "steps": 100})
    schedule = default_method(name).schedule(FeatureProfile.stand_in(blocks, provenance, 100, 16))
    assert schedule.blocks == blocks


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_profile_of_few_steps_can_be_stood_in_for(steps: int) -> None:
    blocks = tuple(Block(0, kind) for kind in BlockKind)
    provenance = Provenance("c", {"name": "ddim", "steps": steps})
    assert Uniform(1).schedule(FeatureProfile.stand_in(blocks, provenance, steps, 4)).mask.shape == (len(blocks), steps)


def test_task_config_fits_its_environment_and_demonstrations() -> None:
    task = _compose("eval").task
    env = environment(task)()
    seen, _ = env.reset(seed=task.seed)
    assert {key: values.shape for key, values in seen.items()} == {
        key: (size,) for key, size in task.observation.items()
    }
    assert env.action_space.shape == (task.action_dim,)
    demos = demonstrations(task)
    assert demos.joined(task.observation).shape == (25_650, 20)
    assert demos.actions.shape == (25_650, task.action_dim)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_robomimic_task_config_is_the_published_one(name: str) -> None:
    task, published = _compose("eval", f"task={name}").task, TASKS[name]
    # The order is the one in which policies join them.
    assert list(task.observation.items()) == list(published.low_dim.items())
    assert (task.name, task.action_dim, task.max_steps) == (name, published.policy_size, published.max_steps)
    assert (task.seed, task.rate_hz, task.action_steps) == (100000, RATE_HZ, 8)


@pytest.mark.parametrize("name", ["lift", "can", "square"])
def test_image_task_config_is_the_published_one(name: str) -> None:
    config = _compose("train", f"task={name}_image", "output=x")
    task, published = config.task, TASKS[name]
    low_dim = {key: size for key, size in published.low_dim.items() if key != "object"}
    assert list(task.observation.items()) == [*((key, 64) for key in published.images), *low_dim.items()]
    assert task.images == {key: [published.image_size] * 2 for key in published.images}
    assert (task.name, task.action_dim, task.max_steps) == (f"{name}_image", published.policy_size, published.max_steps)
    assert task.vision == VisionConfig(dict.fromkeys(published.images, (84, 84)), (76, 76))
    spec = config.policy.build(task)
    assert (spec.network.observation_dim, spec.network.horizon, spec.low_dim) == (137, 10, low_dim)
    recipe = config.optimiser.build(config.seed)
    assert (recipe.weight_decay, recipe.encoder_weight_decay) == (1e-3, 1e-6)
    assert recipe.learning_rate == (5e-4 if name == "lift" else 1e-4)


def test_push_t_image_fits_its_environment() -> None:
    task = _compose("eval", "task=push_t_image", "task.max_steps=2").task
    assert task.vision == VisionConfig({"image": (96, 96)}, (84, 84))
    seen, _ = environment(task)().reset(seed=task.seed)
    assert {key: values.shape for key, values in seen.items()} == {"image": (3, 96, 96), "agent_position": (2,)}
    with pytest.raises(EnvError, match=r"expected a zarr store at here\.zarr, got nothing"):
        demonstrations(task, "here.zarr")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["task.crop=[84,84]"], r"task\.crop: expected height and width from 33 to below"),
        (["task.crop=null"], r"task\.images and task\.crop: expected \[height, width\] each"),
        (["task.crop=[76]"], r"task\.images and task\.crop: expected \[height, width\] each"),
        (["task.observation.agentview_image=3"], r"task\.images: expected keys of task\.observation with 64 channels"),
        (["+task.images.sideview_image=[84,84]"], r"task\.images: expected keys .* got {'sideview_image': None}"),
    ],
)
def test_images_that_do_not_fit_refuse(overrides: list[str], told: str) -> None:
    config = _compose("train", "task=lift_image", "output=x", *overrides)
    with pytest.raises(InvalidInput, match=told):
        config.policy.build(config.task)


def test_demonstrated_images_of_another_size_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    task = _compose("eval", "task=push_t_image").task
    frames = {"image": np.zeros((4, 84, 84, 3), np.uint8), "agent_position": np.zeros((4, 2), np.float32)}
    frames["keypoints"] = np.zeros((4, 18), np.float32)
    read = TaskDemonstrations(frames, np.zeros((4, 2), np.float32), np.array([4]))
    monkeypatch.setitem(tasks._DEMONSTRATIONS, "push_t", lambda *_: read)
    with pytest.raises(
        InvalidInput, match=r"demonstrated images 'image': expected \[96, 96\] pixels .* got \[84, 84\]"
    ):
        demonstrations(task, "store.zarr")
    task.images = {"image": [84, 84]}
    read = demonstrations(task, "store.zarr")
    assert read.joined({"agent_position": 2}).shape == (4, 2)
    # No more than the task observes.
    spread = read.spread_observations(2, 2, seed=0)
    assert list(spread) == ["image", "agent_position"]
    assert (spread["image"].shape, spread["image"].dtype) == ((2, 2, 84, 84, 3), np.uint8)


@pytest.mark.sim
def test_robomimic_task_builds_by_its_action_dim() -> None:
    pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")
    for action_dim in (10, 7):
        task = _compose("eval", "task=lift", f"task.action_dim={action_dim}", "task.max_steps=3").task
        env = environment(task)()
        assert env.action_space.shape == (action_dim,)
        assert (env.max_steps, list(env.reset(seed=0)[0])) == (3, list(task.observation))
    task.action_dim = 8
    for entry in (lambda: environment(task)(), lambda: demonstrations(task)):
        with pytest.raises(EnvError, match=r"lift actions: expected 10 channels \(absolute\) or 7 \(delta\), got 8"):
            entry()


@pytest.mark.parametrize("name", ["tool_hang", "can_image", "push_t_image"])
def test_a_task_without_committed_demonstrations_asks_for_a_path(name: str) -> None:
    told = rf"demonstrations of {name}: expected a path, .*give demonstrations=PATH"
    with pytest.raises(InvalidInput, match=told):
        demonstrations(_compose("eval", f"task={name}").task)


def test_demonstrations_without_an_observation_of_the_task_refuse() -> None:
    task = _compose("eval", "task=lift", "+task.observation.robot0_joint_pos=7").task
    with pytest.raises(InvalidInput, match=r"expected \['robot0_joint_pos'\] as task\.observation, got \['object'"):
        demonstrations(task)


@pytest.mark.parametrize("name", ["lift", "can", "square"])
def test_committed_robomimic_demonstrations_fit_their_task_in_both_kinds_of_actions(name: str) -> None:
    for action_dim in (10, 7):
        task = _compose("eval", f"task={name}", f"task.action_dim={action_dim}").task
        demos = demonstrations(task)
        assert demos.actions.shape[1] == action_dim
        assert len(demos.episode_ends) == 200
        assert {key: values.shape[1] for key, values in demos.observations.items()} == task.observation


def test_unknown_task_name_refuses() -> None:
    task = _compose("eval", "task.name=chess").task
    with pytest.raises(InvalidInput, match=r"task\.name: expected one of \['can', 'lift', 'push_t', .*\], got chess"):
        environment(task)


def test_calibration_observations_come_from_all_over() -> None:
    task = _compose("eval").task
    demos = demonstrations(task)
    spread = demos.spread_observations(32, 2, seed=0)
    assert {key: values.shape for key, values in spread.items()} == {
        "keypoints": (32, 2, 18),
        "agent_position": (32, 2, 2),
    }
    # One from each of 32 stretches of 206 episodes: at least 30 of them lie in different episodes.
    frames = [np_index(demos.observations["keypoints"], row[-1]) for row in spread["keypoints"]]
    assert len({int((demos.episode_ends <= frame).sum()) for frame in frames}) >= 30
    again, other = (demos.spread_observations(32, 2, seed=seed)["keypoints"] for seed in (0, 1))
    assert (again == spread["keypoints"]).all()
    assert not (other == spread["keypoints"]).all()


def test_earlier_observations_stay_in_the_episode() -> None:
    demos = demonstrations(_compose("eval").task)
    # As many stretches as frames: one observation from each frame.
    earlier = demos.spread_observations(len(demos.actions), 2, seed=0, earlier=8)["keypoints"]
    begin, end = demos.episode_ends[:2]
    keypoints = demos.observations["keypoints"]
    assert (earlier[begin + 8 : end, -1] == keypoints[begin : end - 8]).all()
    assert (earlier[begin : begin + 8] == keypoints[begin]).all()
    assert (earlier[:8] == keypoints[0]).all()


def np_index(rows: object, row: object) -> int:
    return int((rows == row).all(axis=1).argmax())


def test_recipe_builds() -> None:
    config = composed("train", "output=x")
    assert isinstance(config.optimiser.build(config.seed), TrainingConfig)
    assert config.policy.build(config.task).network.observation_dim == 20
