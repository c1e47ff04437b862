"""Chapters "Model" and "LoRA". The invariants are those that PEFT's own tests hold it to."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import main

RANKS = list(range(1, 11))
RECIPE = main.Recipe("LoRA", epochs=3, batch_size=7, lr=0.05, to_lower="--lora-lr")


class Odd(nn.Module):
    """A model of odd shapes, with a layer that is not linear and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.inner = nn.Sequential(nn.Linear(13, 17, bias=False), nn.ReLU(), nn.Linear(17, 11))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


def images(n: int = 23) -> Tensor:
    return torch.randn(n, 13, generator=torch.Generator().manual_seed(1))


def trained(rank: int = 2, alpha: float = 3.0) -> tuple[nn.Module, nn.Module]:
    """A base model, and a copy of it with LoRA that was trained for a few steps."""
    torch.manual_seed(0)
    base = Odd()
    lora = main.attach_lora(copy.deepcopy(base), rank, alpha)
    main.train(lora, main.Split(images(), torch.arange(23) % 11), RECIPE, seed=0)
    return base, lora


def test_the_model_has_the_stated_size_and_formula() -> None:
    model = main.MNISTClassifier()
    assert main.count_trainable(model) == 2_807_010
    x = torch.randn(3, 784)
    hidden = (x @ model.linear1.weight.T + model.linear1.bias).clamp(min=0)
    hidden = (hidden @ model.linear2.weight.T + model.linear2.bias).clamp(min=0)
    expected = hidden @ model.linear3.weight.T + model.linear3.bias
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


def test_rank_1_adds_the_stated_parameters_and_leaves_the_class_alone() -> None:
    model = main.attach_lora(main.MNISTClassifier(), rank=1, alpha=1.0)
    assert type(model) is main.MNISTClassifier
    assert main.count_trainable(model) == 6_794
    assert list(main.lora_layers(model)) == ["linear1", "linear2", "linear3"]


@pytest.mark.parametrize("rank", RANKS)
def test_shapes_start_and_effective_weight(rank: int) -> None:
    torch.manual_seed(rank)
    base = Odd()
    model = main.attach_lora(copy.deepcopy(base), rank, alpha=3.0)
    assert torch.equal(model(images()), base(images()))  # B is zero: training starts at W
    for name, lora in main.lora_layers(model).items():
        layer, weight = model.get_submodule(name), base.get_parameter(f"{name}.weight")
        assert lora.lora_A.shape == (rank, weight.shape[1])
        assert lora.lora_B.shape == (weight.shape[0], rank)
        with torch.no_grad():
            lora.lora_B.normal_()
        for strength in (1.0, 0.3):
            main.set_strength(model, strength)
            expected = weight + strength * (3.0 / rank) * lora.lora_B @ lora.lora_A
            torch.testing.assert_close(layer.weight, expected)


def test_lora_a_is_drawn_from_the_seed_with_variance_one_over_in() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return main.LoRAParametrization(torch.zeros(300, 400), rank=300, alpha=1.0).lora_A

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).std().item() * math.sqrt(400) == pytest.approx(1, abs=0.02)
    assert draw(0).mean().item() == pytest.approx(0, abs=0.001)


def test_the_gradient_reaches_lora_alone() -> None:
    model = main.attach_lora(Odd(), rank=2, alpha=1.0)
    for lora in main.lora_layers(model).values():
        nn.init.normal_(lora.lora_B)
    model(images()).square().sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(with_gradient) == 4
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


def test_training_updates_lora_alone() -> None:
    base, lora = trained()
    main.check_frozen(base.state_dict(), lora)
    for layer in main.lora_layers(lora).values():
        assert layer.lora_B.abs().max() > 0
    assert not torch.allclose(lora(images()), base(images()))


@pytest.mark.parametrize("rank", [1, 4, 10])
def test_off_is_the_base_exactly_and_on_is_on_again(rank: int) -> None:
    base, lora = trained(rank)
    on = lora(images())
    with main.lora_off(lora):
        assert torch.equal(lora(images()), base(images()))
        assert lora.inner[0].weight is lora.inner[0].parametrizations.weight.original
    assert torch.equal(lora(images()), on)


def test_an_error_inside_lora_off_restores_each_strength() -> None:
    _, lora = trained()
    first, second = main.lora_layers(lora).values()
    first.strength, second.strength = 0.25, 0.75
    with pytest.raises(KeyError), main.lora_off(lora):
        assert (first.strength, second.strength) == (0, 0)
        raise KeyError
    assert (first.strength, second.strength) == (0.25, 0.75)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_merging_changes_no_output_and_leaves_a_plain_model(strength: float) -> None:
    base, lora = trained()
    main.set_strength(lora, strength)
    expected = lora(images())
    merged = main.merge_lora(lora)
    assert torch.equal(merged(images()), expected)
    assert torch.equal(expected, base(images())) == (strength == 0)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert type(merged.inner[0]) is nn.Linear
    before = copy.deepcopy(merged.state_dict())
    main.check_frozen(before, main.merge_lora(merged))  # merging twice changes nothing more


def test_save_and_load_give_the_same_logits(tmp_path) -> None:
    base, lora = trained(rank=3)
    torch.save(lora.state_dict(), tmp_path / "lora.pt")
    loaded = main.attach_lora(copy.deepcopy(base), rank=3, alpha=3.0)
    loaded.load_state_dict(torch.load(tmp_path / "lora.pt"))
    assert torch.equal(loaded(images()), lora(images()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 10])
def test_dtypes_are_kept_and_outputs_finite(rank: int, dtype: torch.dtype) -> None:
    model = main.attach_lora(Odd().to(dtype), rank, alpha=1.0)
    for lora in main.lora_layers(model).values():
        nn.init.normal_(lora.lora_B)
    out = model(images().to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()
    merged = main.merge_lora(model)
    assert torch.equal(merged(images().to(dtype)), out)


@pytest.mark.parametrize("rank", [0, -1, 12])
def test_a_rank_that_a_layer_cannot_hold_is_refused_before_anything_changes(rank: int) -> None:
    model = Odd()
    with pytest.raises(ValueError, match=f"rank {rank}"):
        main.attach_lora(model, rank, alpha=1.0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not main.lora_layers(model)


def test_attaching_twice_is_refused() -> None:
    model = main.attach_lora(Odd(), 1, alpha=1.0)
    with pytest.raises(ValueError, match="already"):
        main.attach_lora(model, 1, alpha=1.0)


def test_a_model_that_is_itself_a_linear_layer() -> None:
    layer = nn.Linear(5, 4)
    assert list(main.lora_layers(main.attach_lora(layer, 2, alpha=1.0))) == [""]
    assert type(main.merge_lora(layer)) is nn.Linear
