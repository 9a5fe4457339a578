"""Our encoder against robomimic's own, which the original builds; needs the packages of the extra ``robomimic``."""

import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("robomimic", reason="pip install -e '.[robomimic]'")

from policies.vision import IMAGE_FEATURES, ObservationEncoder, VisionConfig

pytestmark = [pytest.mark.sim, pytest.mark.filterwarnings("ignore")]

IMAGES = {"agentview_image": (84, 84), "robot0_eye_in_hand_image": (84, 84)}
KEYS = {"agentview_image": IMAGE_FEATURES, "robot0_eef_pos": 3, "robot0_eye_in_hand_image": IMAGE_FEATURES}
SETTINGS: dict[str, Any] = {
    "low_dim": {
        "core_class": None,
        "core_kwargs": {},
        "obs_randomizer_class": None,
        "obs_randomizer_kwargs": {},
    },
    "rgb": {
        "core_class": "VisualCore",
        "core_kwargs": {
            "feature_dimension": 64,
            "backbone_class": "ResNet18Conv",
            "backbone_kwargs": {"pretrained": False, "input_coord_conv": False},
            "pool_class": "SpatialSoftmax",
            "pool_kwargs": {"num_kp": 32, "learnable_temperature": False, "temperature": 1.0, "noise_std": 0.0},
        },
        "obs_randomizer_class": "CropRandomizer",
        "obs_randomizer_kwargs": {"crop_height": 76, "crop_width": 76, "num_crops": 1, "pos_enc": False},
    },
}
"""robomimic's configuration of image policies (``bc_rnn``, proficient human), which the original takes over."""

DECLARED = []
"""Operators are forgotten with the library that declares them."""


def _import_torchvision() -> None:
    """Beside a torch of another build its operators are missing, and its import fails for want of their names."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        DECLARED.append(library)


def _group_norms(module: nn.Module) -> None:
    """What the original makes of robomimic's batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.GroupNorm(child.num_features // 16, child.num_features))
        else:
            _group_norms(child)


@pytest.fixture(scope="module")
def robomimics() -> nn.Module:
    _import_torchvision()
    from robomimic.models.obs_nets import obs_encoder_factory
    from robomimic.utils import obs_utils

    known = obs_utils.OBS_KEYS_TO_MODALITIES
    modalities = {"rgb": list(IMAGES), "low_dim": ["robot0_eef_pos"]}
    obs_utils.initialize_obs_modality_mapping_from_dict(modalities)
    shapes = OrderedDict((key, [3, *IMAGES[key]] if key in IMAGES else [size]) for key, size in KEYS.items())
    torch.manual_seed(0)
    encoder = obs_encoder_factory(shapes, encoder_kwargs=SETTINGS)
    obs_utils.OBS_KEYS_TO_MODALITIES = known
    _group_norms(encoder)
    return encoder.eval()


def test_same_weights_have_the_same_names_and_give_the_same_token(robomimics: nn.Module) -> None:
    ours = ObservationEncoder(KEYS, VisionConfig(IMAGES, (76, 76))).eval()
    ours.load_state_dict(robomimics.state_dict())
    images = {key: torch.rand(2, 2, 3, 84, 84) for key in IMAGES}
    position = torch.rand(2, 2, 3)
    given = {key: image.flatten(0, 1) * 2 - 1 for key, image in images.items()}
    with torch.no_grad():
        expected = robomimics(given | {"robot0_eef_pos": position.flatten(0, 1)})
        token = ours(position, images).flatten(0, 1)
    assert (expected[:, :64] > 0).any()
    # Sums of at most 4,608 products of order 1, in float32.
    torch.testing.assert_close(token, expected, rtol=1e-5, atol=1e-5)


def test_fresh_weights_are_drawn_alike(robomimics: nn.Module) -> None:
    ours = ObservationEncoder(KEYS, VisionConfig(IMAGES, (76, 76)))
    for (name, theirs), (same, value) in zip(
        sorted(robomimics.named_parameters()), sorted(ours.named_parameters()), strict=True
    ):
        assert name == same
        # Of 1,000 draws the deviation is known to 2 % (one sigma).
        if theirs.numel() >= 1000:
            assert value.std().item() == pytest.approx(theirs.std().item(), rel=0.1), name
