"""The average of the weights: its recursion, and that saving it leaves the weights alone."""

import pytest
import torch
from torch import nn

from rayrlhf.engines.average import WeightAverage


def layer(*weights: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(len(weights), 1, bias=False)
    linear.weight.data = torch.tensor([weights], dtype=dtype)
    return linear


def test_the_average_follows_its_recursion():
    module = layer(1.0, 2.0)
    average = WeightAverage(module, 0.9, rank=0)
    for value in (3.0, 5.0):
        module.weight.data = torch.full((1, 2), value)  # another tensor: an engine may move its weights
        average.update()
    # 0.9 (0.9 x + 0.3) + 0.5
    with average.in_place():
        assert module.weight.tolist()[0] == pytest.approx([0.81 + 0.27 + 0.5, 1.62 + 0.27 + 0.5], rel=1e-6)
    assert module.weight.tolist() == [[5.0, 5.0]]


def test_weights_come_back_bit_by_bit_even_after_an_error():
    module = layer(0.1, 0.3, dtype=torch.bfloat16)
    before = module.weight.detach().clone()
    average = WeightAverage(module, 0.5, rank=0)
    with pytest.raises(RuntimeError), average.in_place():
        raise RuntimeError("the disk is full")
    assert torch.equal(module.weight, before)


def test_small_steps_of_bfloat16_weights_are_not_lost():
    """0.001 of 1.0 is below bfloat16's resolution: the average must be kept in float32."""
    module = layer(1.0, dtype=torch.bfloat16)
    average = WeightAverage(module, 0.999, rank=0)
    module.weight.data = torch.tensor([[2.0]], dtype=torch.bfloat16)
    for _ in range(1000):
        average.update()
    assert float(average.tensors[0]) == pytest.approx(2 - 0.999**1000, rel=1e-4)


def test_other_ranks_hold_nothing_of_an_unsharded_model():
    assert WeightAverage(layer(1.0), 0.9, rank=1).tensors == []


def test_each_rank_averages_its_shards():
    module = layer(1.0, 2.0)
    module.weight.ds_tensor = torch.tensor([4.0])
    average = WeightAverage(module, 0.5, rank=1)
    module.weight.ds_tensor = torch.tensor([8.0])
    average.update()
    with average.in_place():
        assert module.weight.ds_tensor.tolist() == [6.0]
