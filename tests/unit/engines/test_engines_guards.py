"""What the guard names, and what it writes: plain modules in one process."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rayrlhf.data.batching import Cutting
from rayrlhf.engines.batches import cut_experiences
from rayrlhf.engines.guards import check_step, first_bad_tensor, local_grad_norm, tensors_of
from rayrlhf.errors import TrainingError
from tests.engine_fakes import CPU, PlainEngine, experiences


@dataclass(frozen=True)
class Inner:
    weights: Tensor
    array: np.ndarray
    label: str = "not a tensor"


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    pair: tuple[Tensor, list[Tensor]]
    by_name: dict[str, Tensor]
    nothing: None = None


def test_tensors_are_named_by_their_way_through_dataclasses_tuples_and_mappings() -> None:
    a, b, c, d = (torch.full((2,), float(i)) for i in range(4))
    outer = Outer(Inner(a, np.array([7, 8])), (b, [c]), {"key": d})
    found = tensors_of(outer)
    assert list(found) == ["inner.weights", "inner.array", "pair.0", "pair.1.0", "by_name.key"]
    assert found["inner.array"].tolist() == [7, 8]
    assert found["pair.1.0"] is c
    assert list(tensors_of((a, b))) == ["0", "1"]
    assert list(tensors_of(a)) == ["tensor"]
    assert tensors_of([np.array(["text"]), object(), Inner]) == {}


def test_of_an_experience_batch_all_tensors_are_found_and_of_its_rollouts_the_ids() -> None:
    (batch,) = cut_experiences(experiences([(2, 3), (2, 4)]), Cutting(100), CPU)
    found = tensors_of(batch)
    assert {"batch.layout.tokens", "batch.positions", "old_logprobs", "advantages", "returns", "mask"} <= set(found)
    assert sorted(found["batch.rollouts.sample_id"].tolist()) == [100, 101]
    assert not [name for name in found if "versions" in name]


class Root(nn.Module):
    """y = sqrt(|w x|): finite everywhere, with a derivative that is not at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Sequential(nn.Linear(1, 1, bias=False))
        nn.init.ones_(self.first.weight)
        nn.init.ones_(self.second[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).abs().sqrt()


def loss(module: Root, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (module(batch[0]) * batch[1]).sum()


def batches(x: float = 1.0, weight: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    good = torch.ones(3, 1), torch.ones(3, 1)
    bad = torch.ones(3, 1), torch.ones(3, 1)
    bad[0][1], bad[1][1] = x, weight
    return [good, bad]


def first(module: Root, micro_batches: list[tuple[Tensor, Tensor]]) -> str | None:
    return first_bad_tensor(PlainEngine(module), micro_batches, loss, micro_batches[0])


def with_gradients(module: Root, micro_batches: list[tuple[Tensor, Tensor]]) -> Root:
    for batch in micro_batches:
        loss(module, batch).backward()
    return module


def test_the_batch_comes_before_the_parameters_and_these_before_the_activations() -> None:
    module = Root()
    with torch.no_grad():
        module.second[0].weight[0, 0] = math.inf
    assert first(module, batches(weight=math.nan)) == "1 of micro-batch 1"
    assert first(module, batches()) == "the parameter second.0.weight"


def test_the_innermost_module_that_overflows_is_named_with_its_micro_batch() -> None:
    module = Root()
    with torch.no_grad():
        module.second[0].weight[0, 0] = 1e30
    assert first(module, batches(x=1e30)) == "the output of second.0 in micro-batch 1"


def test_a_module_without_a_name_is_named_by_its_type() -> None:
    class Logarithm(Root):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).log()

    assert first(Logarithm(), batches(x=0.0)) == "the output of Logarithm in micro-batch 1"


def test_a_loss_that_overflows_from_finite_outputs_is_named() -> None:
    assert first(Root(), batches(x=1e38, weight=1e30)) == "the loss of micro-batch 1"


def test_a_gradient_is_named_when_all_else_is_finite_the_last_layers_first() -> None:
    """The derivative of the root at 0 is infinite, and 0 times that is NaN."""
    micro_batches = batches(x=0.0)
    module = with_gradients(Root(), micro_batches)
    assert first(module, micro_batches) == "the gradient of second.0.weight"
    assert math.isnan(local_grad_norm(module))


def test_a_sound_step_has_no_bad_tensor_and_a_norm_of_all_its_gradients() -> None:
    """Three rows of y = sqrt(v w x) at v = w = x = 1, twice: dy/dv = dy/dw = 1/2, so each gradient is 3."""
    module = with_gradients(Root(), batches())
    assert first(module, batches()) is None
    assert float(local_grad_norm(module)) == pytest.approx(math.sqrt(3**2 + 3**2))


def test_no_hook_stays_behind() -> None:
    module = Root()
    first(module, batches())
    assert not any(m._forward_hooks for m in module.modules())


class Guarded(PlainEngine):
    def __init__(self, module: nn.Module, folder: Path, max_loss: float = 100.0) -> None:
        super().__init__(module)
        self.settings = Settings(max_loss, str(folder))
        self.engine = SimpleNamespace(global_steps=7)
        self.zero_stage = 0


@dataclass
class Settings:
    max_loss: float
    failed_folder: str
    role: str = "policy"


def test_a_step_within_the_limit_passes_and_leaves_nothing(tmp_path: Path) -> None:
    check_step(Guarded(Root(), tmp_path), -100.0, 1e30, loss, batches(), batches()[0])
    assert not list(tmp_path.iterdir())


def test_the_error_says_what_which_tensor_where_it_is_written_and_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "failed"
    with pytest.raises(TrainingError) as caught:
        check_step(Guarded(Root(), folder), math.nan, 1.0, loss, batches(weight=math.nan), batches()[0])
    assert caught.value.message == (
        "the loss is not finite (nan); the first bad tensor: 1 of micro-batch 1 (1 of 3 numbers); "
        f"its batch is in {folder}/policy-0.safetensors; the weights are those before the step"
    )
    assert caught.value.hint.startswith("look for the sample in the file")
    assert load_file(folder / "policy-0.safetensors")["1.1"].flatten().isnan().tolist() == [False, True, False]
    description = json.loads((folder / "policy-0.json").read_text())
    assert description["loss_share_per_micro_batch"] == [3.0, "nan"]
    assert description["optimizer_steps_before"] == 7


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_finite_loss_over_the_limit_names_the_largest_number_of_either_sign(sign: float, tmp_path: Path) -> None:
    micro_batches = batches(weight=-1e6 * sign)
    with pytest.raises(TrainingError) as caught:
        check_step(Guarded(Root(), tmp_path), 101.0 * sign, 1.0, loss, micro_batches, micro_batches[0])
    assert f"the loss {101 * sign:g} is over run.max_loss 100; the largest: 1 of micro-batch 1 (up to 1e+06); " in str(
        caught.value
    )
    assert "raise run.max_loss" in caught.value.hint


def test_a_search_that_fails_still_raises_the_training_error(tmp_path: Path) -> None:
    def broken(module: Root, batch: tuple[Tensor, Tensor]) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(TrainingError, match=r"the loss is not finite.*the search .* failed \(RuntimeError: out of"):
        check_step(Guarded(Root(), tmp_path), math.inf, 1.0, broken, batches(), batches()[0])


def test_tensors_of_any_number_type_are_found() -> None:
    batch = (torch.ones(2, 3).T, torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16), np.float32([1.5]))
    found = tensors_of(batch)
    assert found.keys() == {"0", "1", "2", "3"}
    assert found["3"].tolist() == [1.5]
