"""Demonstrations of robomimic's tasks: recorded, written, read, replayed, refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="pip install -e '.[robomimic]'")

import h5py
from robomimic.utils.dataset import SequenceDataset

from envs.actions import controller_from_policy, policy_from_controller
from envs.demos.recording import Recorder, make_demonstrations
from envs.demos.robomimic import RecordedEpisode, RobomimicDemonstrations, read_robomimic, write_robomimic
from envs.demos.robomimic_store import main, read_store
from envs.errors import DemonstrationError, EnvError
from envs.robomimic import RobomimicEnv
from envs.robomimic_tasks import TASKS
from envs.rotations import matrix_from_vector

pytestmark = pytest.mark.sim

EPISODES = 3


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three episodes of Lift, each begun after a push."""
    path = tmp_path_factory.mktemp("demos") / "low_dim.hdf5"
    make_demonstrations(Recorder("lift", disturbed=1), path, episodes=EPISODES, first_seed=0)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    return path


def test_a_store_holds_what_its_file_holds(recorded: Path, tmp_path: Path) -> None:
    main(["lift", str(recorded), str(tmp_path / "lift.zarr.zip")])
    for absolute in (True, False):
        copy, read = (
            read_store(tmp_path / "lift.zarr.zip", "lift", absolute=absolute),
            read_robomimic(recorded, "lift", absolute=absolute),
        )
        assert copy.observations.keys() == read.observations.keys()
        for key, values in read.observations.items():
            np.testing.assert_array_equal(copy.observations[key], values)
        np.testing.assert_array_equal(copy.actions, read.actions)
        np.testing.assert_array_equal(copy.episode_ends, read.episode_ends)


def replay(env: RobomimicEnv, demos: RobomimicDemonstrations, episode: int) -> tuple[bool, float]:
    """Return whether an episode's actions succeed from its stored start, and how far its positions go astray, m."""
    start = 0 if episode == 0 else int(demos.episode_ends[episode - 1])
    frames = range(start, int(demos.episode_ends[episode]))
    _, info = env.reset(options={"state": demos.states[start], "model": demos.models[episode]})
    succeeded, astray = False, 0.0
    positions = slice(1, 1 + env.simulation.sim.model.nq)
    for frame in frames:
        astray = max(astray, float(abs(info["state"] - demos.states[frame])[positions].max()))
        *_, success, _, info = env.step(demos.actions[frame])
        succeeded |= success
    return succeeded, astray


def succeed_again(task: str, path: Path) -> tuple[float, float]:
    """Return the share of a file's episodes that succeed again by their deltas, and by their absolute actions."""
    shares = []
    for absolute in (False, True):
        demos = read_robomimic(path, task, absolute=absolute)
        env = RobomimicEnv(task, absolute=absolute)
        shares.append(float(np.mean([replay(env, demos, each)[0] for each in range(len(demos.models))])))
        env.close()
    return shares[0], shares[1]


def test_recorded_file_reads_in_our_keys_and_units(recorded: Path) -> None:
    demos = read_robomimic(recorded, "lift", absolute=True)
    frames = int(demos.episode_ends[-1])
    assert {key: values.shape for key, values in demos.observations.items()} == {
        key: (frames, size) for key, size in TASKS["lift"].low_dim.items()
    }
    assert all(values.dtype == np.float32 for values in (demos.actions, *demos.observations.values()))
    assert (demos.actions.shape, demos.states.shape, len(demos.models)) == ((frames, 10), (frames, 32), EPISODES)
    deltas = read_robomimic(recorded, "lift", absolute=False).actions
    assert deltas.shape == (frames, 7)
    assert 0.5 < abs(deltas).max() <= 1
    # The goal is at most one step from the hand.
    way = demos.actions[1:, :3] - demos.observations["robot0_eef_pos"][1:]
    within = np.setdiff1d(np.arange(frames - 1), np.asarray(demos.episode_ends[:-1]) - 1)
    assert np.linalg.norm(way[within], axis=1).max() < 0.06


def test_replay_succeeds_and_deltas_replay_to_the_bit_nearly(recorded: Path) -> None:
    assert succeed_again("lift", recorded) == (1.0, 1.0)
    # In float64, as stored, the very same simulation; float32 rounds what we read.
    demos = read_robomimic(recorded, "lift", absolute=False)
    with h5py.File(recorded) as file:
        stored = np.concatenate([file[f"data/demo_{each}/actions"][()] for each in range(EPISODES)])
    exact = RobomimicDemonstrations(demos.observations, stored, demos.states, demos.models, demos.episode_ends)
    env = RobomimicEnv("lift", absolute=False)
    assert [replay(env, exact, each) for each in range(EPISODES)] == [(True, 0.0)] * EPISODES


@pytest.mark.parametrize("task", ["can", "square"])
def test_expert_succeeds_and_its_file_replays(task: str, tmp_path: Path) -> None:
    make_demonstrations(Recorder(task, disturbed=1), tmp_path / "a.hdf5", episodes=1, first_seed=0)
    assert succeed_again(task, tmp_path / "a.hdf5") == (1.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lift", "can", "square"])
def test_nearly_every_episode_succeeds_and_replays(task: str, tmp_path: Path) -> None:
    attempts = make_demonstrations(Recorder(task), tmp_path / "a.hdf5", episodes=20, first_seed=500)
    assert attempts <= 22
    assert min(succeed_again(task, tmp_path / "a.hdf5")) >= 0.95


def test_robomimic_reads_it(recorded: Path) -> None:
    keys = tuple(TASKS["lift"].low_dim)
    data = SequenceDataset(
        str(recorded),
        obs_keys=keys,
        dataset_keys=("actions", "actions_abs", "rewards", "dones"),
        frame_stack=2,
        seq_length=10,
        filter_by_attribute="train",
        load_next_obs=True,
    )
    assert data.n_demos == EPISODES - 1
    window = data[len(data) - 1]
    assert window["obs"]["object"].shape == window["next_obs"]["object"].shape == (11, 10)
    np.testing.assert_array_equal(window["obs"]["object"][1], window["next_obs"]["object"][0])
    assert window["actions_abs"].shape == (11, 7)
    assert window["rewards"].max() == 1
    with h5py.File(recorded) as file:
        env_args = json.loads(file["data"].attrs["env_args"])
        assert file["data"].attrs["total"] == sum(file[f"data/demo_{each}"].attrs["num_samples"] for each in range(3))
    assert (env_args["env_name"], env_args["env_version"], env_args["type"]) == ("Lift", "1.4.1", 1)
    assert env_args["env_kwargs"]["controller_configs"]["control_delta"] is True


def test_filter_key_chooses_episodes(recorded: Path) -> None:
    every = read_robomimic(recorded, "lift", absolute=True)
    valid = read_robomimic(recorded, "lift", absolute=True, filter_key="valid", keys=["object"])
    last = slice(int(every.episode_ends[-2]), None)
    assert list(valid.observations) == ["object"]
    np.testing.assert_array_equal(valid.actions, every.actions[last])
    np.testing.assert_array_equal(valid.states, every.states[last])


def edited(source: Path, target: Path, edit: Callable[[h5py.File], object]) -> Path:
    """Return a copy of a file with something done to it."""
    shutil.copy(source, target)
    with h5py.File(target, "r+") as file:
        edit(file)
    return target


def each_episode(do: Callable[[h5py.Group], object]) -> Callable[[h5py.File], object]:
    return lambda file: [do(episode) for episode in file["data"].values()]


def replace(episode: h5py.Group, key: str, values: np.ndarray) -> None:
    del episode[key]
    episode[key] = values


def test_absolute_actions_of_a_published_file_come_from_its_states(recorded: Path, tmp_path: Path) -> None:
    def drop(episode: h5py.Group) -> None:
        del episode["actions_abs"]

    published = edited(recorded, tmp_path / "low_dim.hdf5", each_episode(drop))
    expected, got = (
        controller_from_policy(read_robomimic(path, "lift", absolute=True).actions) for path in (recorded, published)
    )
    # In its first step a controller counts from where a plain reset puts the hand, which the states do not tell.
    firsts = [0, *read_robomimic(recorded, "lift", absolute=True).episode_ends[:-1]]
    rest = np.setdiff1d(np.arange(len(got)), firsts)
    np.testing.assert_allclose(got[rest, :3], expected[rest, :3], atol=1e-6)
    turns = [matrix_from_vector(actions[rest, 3:6]) for actions in (expected, got)]
    # robosuite turns its goal by a float32 matrix, 2.2e-7 off what is computed here in float64; actions read as float32
    # add 2e-8.
    np.testing.assert_allclose(*turns, atol=1e-6)
    np.testing.assert_array_equal(got[:, 6], expected[:, 6])


def test_converted_file_of_diffusion_policy_has_poses_for_actions(recorded: Path, tmp_path: Path) -> None:
    def convert(episode: h5py.Group) -> None:
        replace(episode, "actions", episode["actions_abs"][()])
        del episode["actions_abs"]

    converted = edited(recorded, tmp_path / "low_dim_abs.hdf5", each_episode(convert))
    np.testing.assert_array_equal(
        read_robomimic(converted, "lift", absolute=True).actions,
        read_robomimic(recorded, "lift", absolute=True).actions,
    )
    with pytest.raises(DemonstrationError, match="expected delta actions, got absolute ones"):
        read_robomimic(converted, "lift", absolute=False)


def other_version(file: h5py.File) -> None:
    args = json.loads(file["data"].attrs["env_args"])
    file["data"].attrs["env_args"] = json.dumps(args | {"env_version": "1.2.0"})


def no_version(file: h5py.File) -> None:
    args = json.loads(file["data"].attrs["env_args"])
    del args["env_version"]
    file["data"].attrs["env_args"] = json.dumps(args)


def test_a_file_that_names_no_version_is_read_where_nothing_is_simulated(recorded: Path, tmp_path: Path) -> None:
    unnamed = edited(recorded, tmp_path / "low_dim_abs.hdf5", no_version)
    for absolute in (True, False):
        read, named = (read_robomimic(path, "lift", absolute=absolute) for path in (unnamed, recorded))
        np.testing.assert_array_equal(read.actions, named.actions)
    edited(unnamed, tmp_path / "low_dim.hdf5", each_episode(lambda episode: episode.pop("actions_abs")))
    with pytest.raises(DemonstrationError, match=r"installed robosuite 1\.4\.1, got of an unnamed one; take"):
        read_robomimic(tmp_path / "low_dim.hdf5", "lift", absolute=True)
    assert read_robomimic(tmp_path / "low_dim.hdf5", "lift", absolute=False).actions.shape[1] == 7


def without(name: str) -> Callable[[h5py.File], object]:
    def edit(file: h5py.File) -> None:
        del file[name]

    return edit


REFUSALS: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "version": (other_version, r"expected data of the installed robosuite 1\.4\.1, got of 1\.2\.0"),
    "observation": (without("data/demo_1/obs/object"), r"demo_1: expected .*, got none of \['obs/object'\]"),
    "states": (without("data/demo_2/states"), r"demo_2: expected .*, got none of \['states'\]"),
    "model": (each_episode(lambda episode: episode.attrs.pop("model_file")), r"got none of \['model_file'\]"),
    "data": (without("data"), r"expected a group 'data' with env_args, got \['mask'\]"),
    "width of actions": (
        each_episode(lambda episode: replace(episode, "actions", np.zeros((len(episode["actions"]), 14)))),
        r"demo_0: expected frames of .*'actions': \(7,\).*, got .*'actions': \(14,\)",
    ),
    "width of absolute actions": (
        each_episode(lambda episode: replace(episode, "actions_abs", np.zeros((len(episode["actions"]), 14)))),
        r"demo_0: expected frames of .*'actions_abs': \(7,\).*, got .*'actions_abs': \(14,\)",
    ),
    "width of an observation": (
        each_episode(lambda episode: replace(episode, "obs/object", np.zeros((len(episode["actions"]), 14)))),
        r"demo_0: expected frames of {'obs/object': \(10,\).*, got {'obs/object': \(14,\).*; give the data set",
    ),
    "length": (
        each_episode(lambda episode: replace(episode, "actions", np.zeros((3, 7)))),
        r"expected increasing episode ends and arrays of",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_file_that_does_not_fit_refuses(name: str, recorded: Path, tmp_path: Path) -> None:
    edit, told = REFUSALS[name]
    with pytest.raises(DemonstrationError, match=told) as refused:
        read_robomimic(edited(recorded, tmp_path / "a.hdf5", edit), "lift", absolute=True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_file_cut_short_refuses(kept: float, recorded: Path, tmp_path: Path) -> None:
    whole = recorded.read_bytes()
    (tmp_path / "a.hdf5").write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DemonstrationError, match="expected a whole HDF5 file, got one cut short or damaged"):
        read_robomimic(tmp_path / "a.hdf5", "lift", absolute=True)


def test_wrong_request_refuses(recorded: Path) -> None:
    requests: list[tuple[dict[str, Any], str]] = [
        ({"path": recorded.with_name("b.hdf5")}, "expected a robomimic file at .*, got nothing"),
        ({"task": "can"}, "expected PickPlaceCan for task can, got Lift"),
        ({"task": "stack"}, "robomimic task: expected one of .*, got 'stack'"),
        ({"filter_key": "best"}, r"expected a filter key among \['train', 'valid'\], got 'best'"),
        ({"keys": ["agentview_image"]}, r"got none of \['obs/agentview_image'\]"),
    ]
    for request, told in requests:
        with pytest.raises(EnvError, match=told):
            read_robomimic(**({"path": recorded, "task": "lift", "absolute": True} | request))


class Killed(Exception):
    pass


def test_killed_run_goes_on_and_gives_the_same_file(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, recorder = tmp_path / "low_dim.hdf5", Recorder("lift", disturbed=1)

    def kill(seed: int, success: bool) -> None:
        raise Killed

    with pytest.raises(Killed):
        make_demonstrations(recorder, path, episodes=EPISODES, first_seed=0, on_attempt=kill)
    assert not path.exists()
    with pytest.raises(DemonstrationError, match=r"expected the settings of the unfinished run in .*'noise_m': 0,"):
        make_demonstrations(Recorder("lift", noise_m=0), path, episodes=EPISODES, first_seed=0)
    played: list[int] = []
    record = Recorder.record
    monkeypatch.setattr(Recorder, "record", lambda self, env, seed: played.append(seed) or record(self, env, seed))
    assert make_demonstrations(recorder, path, episodes=EPISODES, first_seed=0) == EPISODES
    assert played == [1, 2]
    with h5py.File(recorded) as first, h5py.File(path) as again:
        for episode in first["data"]:
            for key in ("actions", "actions_abs", "states", "obs/object", "next_obs/robot0_eef_pos", "dones"):
                np.testing.assert_array_equal(first["data"][episode][key][()], again["data"][episode][key][()])
    with pytest.raises(DemonstrationError, match=r"expected nothing at .*low_dim\.hdf5, got a file"):
        make_demonstrations(recorder, path, episodes=EPISODES, first_seed=0)


def test_several_processes_record_the_same_file(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "low_dim.hdf5"
    make_demonstrations(Recorder("lift", disturbed=1), path, episodes=2, first_seed=0, processes=2)
    with h5py.File(recorded) as first, h5py.File(path) as again:
        for episode in again["data"]:
            np.testing.assert_array_equal(first["data"][episode]["states"][()], again["data"][episode]["states"][()])


def test_failures_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Recorder, env: RobomimicEnv, seed: int) -> RecordedEpisode | None:
        return RecordedEpisode({"actions": np.full((2, 7), seed / 10)}, "<mujoco/>", seed) if seed % 3 == 0 else None

    monkeypatch.setattr(Recorder, "record", record)
    told: list[tuple[int, bool]] = []
    arguments: dict[str, Any] = {"episodes": 2, "first_seed": 1, "on_attempt": lambda *each: told.append(each)}
    assert make_demonstrations(Recorder("lift"), tmp_path / "a.hdf5", **arguments) == 6
    assert told == [(seed, seed % 3 == 0) for seed in range(1, 7)]
    with h5py.File(tmp_path / "a.hdf5") as file:
        assert [episode.attrs["seed"] for episode in file["data"].values()] == [3, 6]


def test_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    def episodes() -> Any:
        yield RecordedEpisode({"actions": np.zeros((2, 7))}, "<mujoco/>", 0)
        raise Killed

    with pytest.raises(Killed):
        write_robomimic(tmp_path / "a.hdf5", episodes(), {})
    assert not (tmp_path / "a.hdf5").exists()
    write_robomimic(tmp_path / "a.hdf5", [RecordedEpisode({"actions": np.zeros((2, 7))}, "<mujoco/>", 0)], {})
    assert [each.name for each in tmp_path.iterdir()] == ["a.hdf5"]


def test_images_are_recorded_as_bytes_and_read_as_observed(tmp_path: Path) -> None:
    path, recorder = tmp_path / "image.hdf5", Recorder("lift", disturbed=0, images=True)
    make_demonstrations(recorder, path, episodes=1, first_seed=0)
    demos = read_robomimic(path, "lift", absolute=True, keys=("robot0_eef_pos", "agentview_image"))
    images = demos.observations["agentview_image"]
    assert (images.shape[1:], images.dtype) == ((84, 84, 3), np.uint8)
    # The very frame that the recorder's environment sees from there, as bytes.
    with closing(RobomimicEnv("lift", observation=["agentview_image"])) as env:
        seen, _ = env.reset(options={"state": demos.states[0], "model": demos.models[0]})
    np.testing.assert_allclose(images[0].transpose(2, 0, 1) / 255, seen["agentview_image"], atol=1e-6)
    assert (images[0] != images[-1]).any()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"task": "tool_hang"}, r"scripted expert: expected one of \['can', 'lift', 'square'\], got 'tool_hang'"),
        ({"task": "lift", "disturbed": 1.5}, "recording: expected noise_m >= 0, disturbed in"),
        ({"task": "lift", "noise_m": -1}, "recording: expected noise_m >= 0"),
    ],
)
def test_wrong_recorder_refuses(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(EnvError, match=told):
        Recorder(**arguments)


def test_no_episodes_refuse(tmp_path: Path) -> None:
    with pytest.raises(DemonstrationError, match="recording: expected episodes and processes of at least 1"):
        make_demonstrations(Recorder("lift"), tmp_path / "a.hdf5", episodes=0, first_seed=0)
    assert not list(tmp_path.iterdir())


def test_stored_poses_are_controller_poses(recorded: Path) -> None:
    with h5py.File(recorded) as file:
        stored = file["data/demo_0/actions_abs"][()]
    demos = read_robomimic(recorded, "lift", absolute=True)
    np.testing.assert_allclose(demos.actions[: len(stored)], policy_from_controller(stored), atol=1e-6)
