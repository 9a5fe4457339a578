import pytest
import torch

from bac.errors import InvalidInput
from policies.vision import VisionConfig, central_crop, random_crop, signed_images
from tests.policies.networks import IMAGE_KEYS, image_encoder

COORDINATES = torch.arange(40 * 48.0).reshape(1, 1, 40, 48).expand(200, 3, 40, 48)
"""Images whose pixels say where they are."""


def _seen(seed: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (3, 2, 40, 48, 3), generator=draw, dtype=torch.uint8)
    return torch.rand(3, 2, 3, generator=draw), {"camera": images}


def test_token_has_low_dim_and_features_in_the_order_of_the_keys() -> None:
    low_dim, images = _seen()
    token = image_encoder()(low_dim, images)
    assert token.shape == (3, 2, sum(IMAGE_KEYS.values()))
    assert torch.equal(token[..., :2], low_dim[..., :2])
    assert torch.equal(token[..., -1:], low_dim[..., 2:])
    features = token[..., 2:-1]
    assert (features >= 0).all()
    assert (features > 0).any()
    # Each image has features of its own.
    assert len(features.flatten(0, 1).unique(dim=0)) == 6


def test_bytes_and_floats_are_the_same_image() -> None:
    low_dim, images = _seen()
    floats = {"camera": images["camera"].movedim(-1, -3) / 255}
    assert torch.equal(image_encoder()(low_dim, images), image_encoder()(low_dim, floats))
    assert signed_images(torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 1, 3)).flatten().tolist() == (
        pytest.approx([-1, 1, -0.6])
    )


def test_crop_is_random_in_training_only() -> None:
    low_dim, images = _seen()
    encoder = image_encoder()
    torch.manual_seed(0)
    evaluated = [encoder(low_dim, images) for _ in range(2)]
    assert torch.equal(*evaluated)
    encoder.train()
    try:
        trained = [encoder(low_dim, images) for _ in range(2)]
        torch.manual_seed(0)
        again = encoder(low_dim, images)
    finally:
        encoder.eval()
    assert not torch.equal(*trained)
    assert torch.equal(trained[0], again)


def test_random_crops_are_pieces_of_their_images_at_places_of_their_own() -> None:
    torch.manual_seed(0)
    crops = random_crop(COORDINATES, (33, 36))
    assert crops.shape == (200, 3, 33, 36)
    place = crops[:, 0, 0, 0]
    inside = torch.arange(33.0)[:, None] * 48 + torch.arange(36.0)
    assert torch.equal(crops, (place[:, None, None, None] + inside).expand_as(crops))
    # As the original draws them: below the margin, which is 7 rows and 12 columns.
    assert (place // 48).unique().tolist() == list(range(7))
    assert (place % 48).unique().tolist() == list(range(12))


@pytest.mark.parametrize(("crop", "place"), [((38, 44), (1, 2)), ((33, 36), (4, 6)), ((35, 47), (2, 0))])
def test_central_crop_is_the_middle(crop: tuple[int, int], place: tuple[int, int]) -> None:
    assert central_crop(COORDINATES[:1], crop)[0, 0, 0, 0] == place[0] * 48 + place[1]


@pytest.mark.parametrize("crop", [(40, 36), (33, 48), (32, 36)])
def test_crop_that_fits_no_image_refuses(crop: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match=r"^task\.crop: expected height and width from 33 to below .* got \["):
        VisionConfig({"camera": (40, 48)}, crop)
