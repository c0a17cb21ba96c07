"""Parts of a model leave their device and come back as they were. On a CPU the device is the host, which frees nothing
and otherwise goes the same way."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rayrlhf.models.residence import Part, Residence, tensors_within, weights_of

CPU = torch.device("cpu")


class Trained:
    """A layer and Adam, after a step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(3, 2)
        self.adam = torch.optim.AdamW(self.module.parameters(), lr=0.1)
        self.residence = Residence(CPU)
        self.step()

    def step(self) -> None:
        self.module(torch.ones(4, 3)).square().sum().backward()
        self.adam.step()

    def occupy(self, part: Part) -> None:
        rest = tensors_within([self.adam.state, list(self.module.parameters())])
        self.residence.occupy(part, list(weights_of(self.module)), rest)

    def sizes(self) -> tuple[int, int, int]:
        """Bytes here of the weight, its gradient and Adam's first moment."""
        weight = self.module.weight
        return tuple(t.untyped_storage().nbytes() for t in (weight, weight.grad, self.adam.state[weight]["exp_avg"]))


@pytest.mark.parametrize(("part", "sizes"), [("none", (0, 0, 0)), ("weights", (24, 0, 0)), ("all", (24, 24, 24))])
@pytest.mark.parametrize("before", ["none", "weights", "all"])
def test_exactly_the_part_asked_for_is_there_whatever_was_before(
    before: Part, part: Part, sizes: tuple[int, ...]
) -> None:
    trained = Trained()
    trained.occupy(before)
    trained.occupy(part)
    assert trained.sizes() == sizes


def test_a_model_that_was_away_learns_on_as_if_it_had_stayed() -> None:
    stayed, away = Trained(), Trained()
    for part in ("none", "weights", "none", "all"):
        away.occupy(part)
    stayed.step()
    away.step()
    assert torch.equal(stayed.module.weight, away.module.weight)
    assert not torch.equal(stayed.module.weight, Trained().module.weight)


def test_views_of_a_buffer_leave_and_return_with_it() -> None:
    flat = torch.arange(6.0)
    view, residence = flat[2:4], Residence(CPU)
    residence.occupy("none", [view], [])
    assert flat.untyped_storage().nbytes() == 0
    residence.occupy("all", [view], [])
    flat[3] = 7.0
    assert view.tolist() == [2.0, 7.0]
    assert flat.tolist() == [0.0, 1.0, 2.0, 7.0, 4.0, 5.0]


def test_weights_that_are_also_among_the_rest_stay_with_the_weights() -> None:
    weight, moment = torch.ones(2), torch.ones(3)
    Residence(CPU).occupy("weights", [weight], [weight, moment])
    assert (weight.untyped_storage().nbytes(), moment.untyped_storage().nbytes()) == (8, 0)


def test_weights_mapped_from_a_file_stay(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4)}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")["w"]
    residence = Residence(CPU)
    residence.occupy("none", [mapped], [])
    residence.occupy("all", [mapped], [])
    assert mapped.tolist() == [1.0] * 4


def test_tensors_are_found_in_containers_in_states_by_parameter_and_as_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    moment, listed = torch.full((1,), 2.0), torch.full((1,), 3.0)
    state = defaultdict(dict, {parameter: {"exp_avg": moment, "step": 4}})
    found = [float(t.detach()) for t in tensors_within({"state": state, "groups": [[listed], "words"]})]
    assert found == [0.0, 1.0, 2.0, 3.0]
