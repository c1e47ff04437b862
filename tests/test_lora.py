"""Model and LoRA. The invariants are those that PEFT's own tests hold it to."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import main


class Odd(nn.Module):
    """A model of odd shapes, with a layer that is not linear and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.inner = nn.Sequential(nn.Linear(13, 17, bias=False), nn.ReLU(), nn.Linear(17, 11))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.norm(x))


LAYERS = ["inner.0", "inner.2"]
IMAGES = torch.randn(23, 13, generator=torch.Generator().manual_seed(1))


def trained(rank: int = 2) -> tuple[nn.Module, nn.Module]:
    """A base model, and a copy of it with LoRA that was trained for a few steps."""
    torch.manual_seed(0)
    base = Odd()
    lora = main.attach_lora(copy.deepcopy(base), rank, alpha=3.0, layers=LAYERS)
    split = main.Split(IMAGES, torch.arange(23) % 11)
    main.train(lora, split, 0, "LoRA", lr=0.05, epochs=3, batch=7)
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


@pytest.mark.parametrize("rank", [1, 2, 10])
def test_shapes_start_and_effective_weight(rank: int) -> None:
    base = Odd()
    model = main.attach_lora(copy.deepcopy(base), rank, alpha=3.0, layers=LAYERS)
    assert list(main.lora_layers(model)) == ["inner.0", "inner.2"]
    assert torch.equal(model(IMAGES), base(IMAGES))  # B is zero: training starts at W
    for name, lora in main.lora_layers(model).items():
        layer, weight = model.get_submodule(name), base.get_parameter(f"{name}.weight")
        assert lora.lora_A.shape == (rank, weight.shape[1])
        assert lora.lora_B.shape == (weight.shape[0], rank)
        nn.init.normal_(lora.lora_B)
        for strength in (1.0, 0.3):
            assert main.set_strength(model, strength) is model
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


def test_training_updates_every_tensor_of_lora_and_nothing_else() -> None:
    base, lora = trained()
    torch.manual_seed(0)
    start = dict(main.attach_lora(Odd(), 2, 3.0, LAYERS).named_parameters())  # as it began
    parts = {f"inner.{i}.parametrizations.weight.0.lora_{x}" for i in (0, 2) for x in "AB"}
    assert {n for n, tensor in lora.named_parameters() if tensor.requires_grad} == parts
    assert {
        n for n, tensor in lora.named_parameters() if not torch.equal(tensor, start[n])
    } == parts
    assert main.changed_tensors(base, lora) == []


@pytest.mark.parametrize("rank", [1, 10])
def test_off_is_the_base_exactly_and_on_is_on_again(rank: int) -> None:
    base, lora = trained(rank)
    on = lora(IMAGES)
    assert not torch.allclose(on, base(IMAGES))
    main.set_strength(lora, 0)
    assert torch.equal(lora(IMAGES), base(IMAGES))
    assert lora.inner[0].weight is lora.inner[0].parametrizations.weight.original
    assert torch.equal(main.set_strength(lora, 1)(IMAGES), on)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_merging_makes_a_plain_copy_with_the_same_outputs(strength: float) -> None:
    base, lora = trained()
    before = copy.deepcopy(base.state_dict())
    expected = main.set_strength(lora, strength)(IMAGES)
    merged = main.merge_lora(base, lora)
    assert torch.equal(merged(IMAGES), expected)
    assert torch.equal(expected, base(IMAGES)) == (strength == 0)
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert type(merged.inner[0]) is nn.Linear
    assert all(torch.equal(before[name], x) for name, x in base.state_dict().items())
    assert list(main.lora_layers(lora)) == LAYERS  # which stays as it was
    assert torch.equal(lora(IMAGES), expected)


def test_the_type_of_the_weights_is_kept() -> None:
    model = main.attach_lora(Odd().to(torch.bfloat16), 2, 1.0, LAYERS)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert model(IMAGES.to(torch.bfloat16)).dtype == torch.bfloat16


def test_lora_on_the_last_layer_alone() -> None:
    base = main.MNISTClassifier()
    lora = main.attach_lora(copy.deepcopy(base), rank=2, alpha=2.0, layers=["linear3"])
    assert list(main.lora_layers(lora)) == ["linear3"]
    assert main.count_trainable(lora) == 2 * (10 + 2000)
    images = torch.randn(60, 784)
    split = main.Split(images, torch.full((60,), 3))
    main.train(lora, split, 0, "LoRA", lr=0.05, batch=20)
    assert main.changed_tensors(base, lora) == []
    assert not torch.equal(lora(images), base(images))
    for layer in ("linear1", "linear2"):
        assert torch.equal(main.weight(lora, layer), main.weight(base, layer))
    merged = main.merge_lora(base, lora)
    assert main.changed_tensors(base, merged) == ["linear3.weight"]
    assert {name.split(".")[2] for name in main.adapter_state(lora)} == {"linear3"}
    main.check_lora(base, lora, 2, split)


@pytest.mark.parametrize("name", ["norm.bias", "inner.0.weight", "inner.2.weight", "inner.2.bias"])
def test_changed_tensors_names_what_differs_by_a_bit(name: str) -> None:
    base, lora = trained()
    held = name.replace("inner.2.weight", "inner.2.parametrizations.weight.original")
    held = held.replace("inner.0.weight", "inner.0.parametrizations.weight.original")
    value = lora.get_parameter(held).detach().view(-1)[-1]
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    assert main.changed_tensors(base, lora) == [name]


def test_changed_tensors_sees_a_sign_of_zero_and_a_missing_tensor() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.bias)
    other = copy.deepcopy(layer)
    other.bias.detach().neg_()
    assert main.changed_tensors(layer, other) == ["bias"]
    other.bias = None
    assert main.changed_tensors(layer, other) == ["bias"]
