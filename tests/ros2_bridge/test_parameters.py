"""Parameters: types, ranges, and the files that ship."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bac.control import Seam
from bac.errors import CorruptArtefact, InvalidInput, MissingArtefact
from ros2_bridge.__main__ import _parser, parameters
from ros2_bridge.mapping import require_sources
from ros2_bridge.parameters import PARAMETERS, ParameterType, key_parameters, parameter_file, read_values
from ros2_bridge.settings import NodeSettings

CONFIG = Path(__file__).parents[2] / "ros2_bridge" / "config"


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_that_ships_maps_its_policy_s_observation(path: Path) -> None:
    settings = NodeSettings.read(parameter_file(path))
    task = yaml.safe_load((CONFIG.parents[1] / "configs" / "task" / f"{path.stem}.yaml").read_text())
    images = task.get("images", {})
    shapes = {key: (*images[key], 3) if key in images else (size,) for key, size in task["observation"].items()}
    require_sources(settings.sources, shapes)
    assert settings.values["rate_hz"] == task["rate_hz"]
    assert settings.values["task"] == task["name"]
    # ROS 2 takes no integer for a double.
    written = parameter_file(path)
    doubles = {each.name for each in PARAMETERS if each.kind is ParameterType.DOUBLE}
    assert all(isinstance(written[name], float) for name in doubles & written.keys())


def _values(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    match node:
        case yaml.MappingNode():
            for _, value in node.value:
                yield from _values(value)
        case yaml.SequenceNode():
            for value in node.value:
                yield from _values(value)
        case yaml.ScalarNode():
            yield node


@pytest.mark.parametrize("path", sorted(CONFIG.glob("*.yaml")), ids=lambda path: path.stem)
def test_no_word_of_a_file_that_ships_is_a_truth_value_to_ros(path: Path) -> None:
    """rcl_yaml_param_parser reads YAML 1.1's words for it, more than PyYAML does, and refuses a list of two types."""
    words = {"y", "n", "yes", "no", "on", "off", "true", "false"}
    values = list(_values(yaml.compose(path.read_text())))
    assert len(values) > 10
    assert [each.value for each in values if each.style is None and each.value.lower() in words] == []


def test_every_parameter_is_described_and_its_default_fits() -> None:
    for each in (*PARAMETERS, *key_parameters("key")):
        assert each.description[-1] == "."
        assert each.read(each.default) == each.default
        assert each.kind not in {ParameterType.INTEGER, ParameterType.DOUBLE} or each.low < each.high < float("inf")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rate_hz": "fast"}, "a double"),
        ({"rate_hz": True}, "a double"),
        ({"rate_hz": float("nan")}, "a double"),
        ({"rate_hz": 1001.0}, "0.1 to 1000"),
        ({"threads": 1.5}, "an? integer"),
        ({"threads": -1}, "0 to 1024"),
        ({"seam": "glue"}, "one of replace, blend, inpaint"),
        ({"cache": 5}, "a string"),
        ({"caches": "bac"}, "a string array"),
        ({"action_low": ["x"]}, "a double array"),
        ({"use_sim_time": 1}, "a boolean"),
        ({"speed": 1}, "speed"),
        ({"observation.x.topic": "x"}, "observation.x.topic"),
    ],
)
def test_values_that_do_not_fit_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        read_values(given)


def test_a_whole_number_is_a_double_and_keys_bring_their_parameters() -> None:
    values = read_values({"rate_hz": 20, "observation_keys": ["x"], "observation.x.type": "pose"})
    assert (values["rate_hz"], values["observation.x.topic"], values["observation.x.type"]) == (20.0, "x", "pose")


def test_limits_go_in_pairs() -> None:
    with pytest.raises(InvalidInput, match="action limits"):
        NodeSettings.read({"action_low": [0.0]})


def test_zeros_are_no_rest_of_a_trajectory() -> None:
    given = {"output": "trajectory", "action_names": ["x"]}
    with pytest.raises(InvalidInput) as refused:
        NodeSettings.read(given | {"hold": "zero"})
    told = "hold: expected repeat or silent with output: trajectory, got zero; its points are positions."
    assert str(refused.value) == told
    assert NodeSettings.read(given | {"hold": "silent"}).values["hold"] == "silent"


def test_settings_become_the_loop_s() -> None:
    values = {"replan_ticks": 0, "deadline_ticks": -1, "seam": "inpaint", "rate_hz": 10.0}
    loop = NodeSettings.read(values).loop(action_steps=8, slowest_ms=120.0, schedules=2)
    assert (loop.replan_ticks, loop.deadline_ticks, loop.seam) == (8, 2, Seam.INPAINT)
    loop = NodeSettings.read(values | {"replan_ticks": 3, "deadline_ticks": 0}).loop(8, 120.0, 2)
    assert (loop.replan_ticks, loop.deadline_ticks) == (3, 0)


def test_the_command_line_comes_on_top_of_the_file() -> None:
    given = parameters(_parser().parse_args(["--task", "push_t", "--cache", "late", "--set", "rate_hz=5.0"]))
    assert (given["cache"], given["rate_hz"], given["observation.keypoints.type"]) == ("late", 5.0, "array")
    lift = parameters(_parser().parse_args(["--params", str(CONFIG / "lift.yaml")]))
    assert lift["task"] == "lift"
    with pytest.raises(InvalidInput, match="name=value"):
        parameters(_parser().parse_args(["--set", "rate_hz"]))
    with pytest.raises(MissingArtefact, match=r"nothing\.yaml"):
        parameters(_parser().parse_args(["--task", "nothing"]))


@pytest.mark.parametrize("text", ["a: [", "node: {rate_hz: 1.0}", "- 1", ""])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(CorruptArtefact, match="ros__parameters"):
        parameter_file(path)
