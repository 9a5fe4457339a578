import pytest
import torch

from bac.errors import InvalidInput
from policies.diffusion_transformer import DiffusionTransformer, DiffusionTransformerConfig

PUSH_T = DiffusionTransformerConfig(action_dim=2, observation_dim=20)


def test_state_dict_names_and_shapes_are_the_originals() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in DiffusionTransformer(PUSH_T).state_dict().items()}
    layer = {
        "self_attn.in_proj_weight": (768, 256),
        "self_attn.in_proj_bias": (768,),
        "self_attn.out_proj.weight": (256, 256),
        "self_attn.out_proj.bias": (256,),
        "multihead_attn.in_proj_weight": (768, 256),
        "multihead_attn.in_proj_bias": (768,),
        "multihead_attn.out_proj.weight": (256, 256),
        "multihead_attn.out_proj.bias": (256,),
        "linear1.weight": (1024, 256),
        "linear1.bias": (1024,),
        "linear2.weight": (256, 1024),
        "linear2.bias": (256,),
        **{f"norm{number}.{name}": (256,) for number in (1, 2, 3) for name in ("weight", "bias")},
    }
    assert shapes == {
        "_dummy_variable": (0,),
        "pos_emb": (1, 16, 256),
        "cond_pos_emb": (1, 3, 256),
        "mask": (16, 16),
        "memory_mask": (16, 3),
        "input_emb.weight": (256, 2),
        "input_emb.bias": (256,),
        "cond_obs_emb.weight": (256, 20),
        "cond_obs_emb.bias": (256,),
        "encoder.0.weight": (1024, 256),
        "encoder.0.bias": (1024,),
        "encoder.2.weight": (256, 1024),
        "encoder.2.bias": (256,),
        "ln_f.weight": (256,),
        "ln_f.bias": (256,),
        "head.weight": (2, 256),
        "head.bias": (2,),
        **{f"decoder.layers.{n}.{name}": shape for n in range(8) for name, shape in layer.items()},
    }


def test_attention_is_causal() -> None:
    torch.manual_seed(0)
    network = DiffusionTransformer(PUSH_T).eval()
    sample, condition, timestep = torch.randn(1, 16, 2), torch.randn(1, 2, 20), torch.tensor(50)
    changed = sample.clone()
    changed[:, 9:] += 1
    difference = (network(changed, timestep, condition) - network(sample, timestep, condition)).abs().amax(dim=-1)[0]
    assert (difference[:9] == 0).all()
    assert (difference[9:] > 0).all()


def test_memory_mask_hides_later_observations() -> None:
    # Action t sees the time token and observations 0..t, so only action 0 does not see observation 1.
    torch.manual_seed(0)
    network = DiffusionTransformer(PUSH_T).eval()
    sample, condition, timestep = torch.randn(1, 16, 2), torch.randn(1, 2, 20), torch.tensor(50)
    changed = condition.clone()
    changed[:, 1] += 1
    difference = (network(sample, timestep, changed) - network(sample, timestep, condition)).abs().amax(dim=-1)[0]
    assert difference[0] == 0
    assert (difference[1:] > 0).all()


def test_scalar_and_batched_time_steps_agree() -> None:
    torch.manual_seed(0)
    network = DiffusionTransformer(PUSH_T).eval()
    sample, condition = torch.randn(3, 16, 2), torch.randn(3, 2, 20)
    batched = network(sample, torch.full((3,), 7), condition)
    assert torch.equal(network(sample, torch.tensor(7), condition), batched)
    assert not torch.equal(network(sample, torch.tensor(8), condition), batched)


@pytest.mark.parametrize("change", [{"layers": 0}, {"width": 6, "heads": 4}, {"action_dim": 0}])
def test_impossible_sizes_refuse(change: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="network sizes"):
        DiffusionTransformerConfig(**{"action_dim": 2, "observation_dim": 20} | change)
