import numpy as np
import pytest
import torch

from bac.errors import InvalidInput
from policies.normalizer import LimitsNormalizer

DATA = np.array([[0.0, -5.0], [10.0, 5.0], [2.5, 0.0]], dtype=np.float32)


def test_demonstration_limits_map_to_one() -> None:
    normalized = LimitsNormalizer.fit(DATA, "action").normalize(torch.from_numpy(DATA))
    assert normalized.tolist() == [[-1, -1], [1, 1], [-0.5, 0]]


def test_unnormalize_inverts_normalize() -> None:
    normalizer = LimitsNormalizer.fit(DATA, "action")
    values = torch.from_numpy(np.random.default_rng(0).uniform(-100, 100, (7, 3, 2)).astype(np.float32))
    # A multiply and a divide in float32 on values up to 100.
    torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(values)), values, rtol=1e-5, atol=1e-4)


def test_a_channel_counts_as_at_least_a_share_of_the_widest_about_its_own_middle() -> None:
    data = np.array([[0.0, 4.9, 3.0], [10.0, 5.1, 1.0]], dtype=np.float32)
    normalized = LimitsNormalizer.fit(data, "action", least_range=0.1).normalize(torch.from_numpy(data))
    # Ranges 10, 0.2 -> 1, 2.
    torch.testing.assert_close(normalized, torch.tensor([[-1.0, -0.2, 1.0], [1.0, 0.2, -1.0]]), rtol=0, atol=1e-5)


def test_policy_that_sees_images_alone_has_no_channels_to_fit() -> None:
    assert LimitsNormalizer.fit(np.empty((3, 0), np.float32), "observation", least_range=0.1).channels == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_demonstrations_that_are_not_finite_refuse(bad: float) -> None:
    data = DATA.copy()
    data[1, 0] = bad
    with pytest.raises(InvalidInput, match="demonstration action: expected finite values, got 1"):
        LimitsNormalizer.fit(data, "action")


def test_constant_channel_refuses_by_number() -> None:
    data = np.column_stack([DATA, np.full(3, 7, np.float32)])
    with pytest.raises(InvalidInput, match=r"constant channels \[2\]"):
        LimitsNormalizer.fit(data, "observation")


@pytest.mark.parametrize(
    ("scale", "offset"), [([1.0, 0.0], [0.0, 0.0]), ([1.0, np.nan], [0.0, 0.0]), ([1.0], [0.0, 0.0])]
)
def test_unusable_statistics_refuse(scale: list[float], offset: list[float]) -> None:
    with pytest.raises(InvalidInput, match="normaliser statistics"):
        LimitsNormalizer(torch.tensor(scale), torch.tensor(offset))
