"""Model and LoRA. The invariants are those that PEFT's own tests hold it to."""

import copy

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


def models(layers: list[str] = LAYERS) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A base model, a copy with LoRA, and a copy of that which was trained for a few steps."""
    torch.manual_seed(0)
    base = Odd()
    start = main.attach_lora(copy.deepcopy(base), 2, alpha=3.0, layers=layers)
    lora = copy.deepcopy(start)
    split = main.Split(IMAGES, torch.arange(23) % 11)
    main.train(lora, split, 0, "LoRA", lr=0.05, epochs=3, batch=7)
    return base, start, lora


def test_the_model_is_three_layers_with_relu_between() -> None:
    model, x = main.MNISTClassifier(), torch.randn(3, 784)
    layers = [model.linear1, nn.ReLU(), model.linear2, nn.ReLU(), model.linear3]
    torch.testing.assert_close(model(x), nn.Sequential(*layers)(x))
    assert f"{main.count_trainable(model):,}" in main.MNISTClassifier.__doc__


@pytest.mark.parametrize("rank", [1, 10])
def test_lora_starts_at_the_weight_and_adds_its_scaled_product_to_it(rank: int) -> None:
    base = Odd()
    model = main.attach_lora(copy.deepcopy(base), rank, alpha=3.0, layers=LAYERS)
    assert torch.equal(model(IMAGES), base(IMAGES))
    assert list(main.lora_layers(model)) == LAYERS
    for name, lora in main.lora_layers(model).items():
        weight = main.weight(base, name)
        assert lora.lora_A.shape == (rank, weight.shape[1])
        nn.init.normal_(lora.lora_B)
        for strength in (1.0, 0.3):
            main.set_strength(model, strength)
            expected = weight + strength * (3.0 / rank) * lora.lora_B @ lora.lora_A
            torch.testing.assert_close(main.weight(model, name), expected)


def test_lora_a_is_drawn_by_the_seed_with_variance_one_over_in_and_the_type_of_the_weight() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return main.LoRAParametrization(torch.zeros(300, 400), rank=300, alpha=1.0).lora_A

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    std, mean = torch.std_mean(draw(0) * 400**0.5)
    assert (std.item(), mean.item()) == pytest.approx((1, 0), abs=0.02)
    half = main.LoRAParametrization(torch.zeros(3, 4, dtype=torch.bfloat16), rank=2, alpha=1.0)
    assert {matrix.dtype for matrix in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("layers", [LAYERS, ["inner.2"]])
def test_training_changes_each_tensor_of_lora_and_nothing_else(layers: list[str]) -> None:
    base, start, lora = models(layers)
    then, now = dict(start.named_parameters()), dict(lora.named_parameters())
    parts = {f"{layer}.parametrizations.weight.0.lora_{x}" for layer in layers for x in "AB"}
    assert {name for name in now if not torch.equal(now[name], then[name])} == parts
    assert {name for name in now if now[name].requires_grad} == parts
    assert main.changed_tensors(base, lora) == []
    changed = main.changed_tensors(base, main.merge_lora(base, lora))
    assert changed == [f"{layer}.weight" for layer in layers]


def test_off_is_the_base_exactly_on_is_on_again_and_merged_is_the_same() -> None:
    base, _, lora = models()
    on, before = lora(IMAGES), copy.deepcopy(base)
    for strength in (0, 0.4, 1):
        expected = main.set_strength(lora, strength)(IMAGES)
        assert torch.equal(expected, base(IMAGES)) == (strength == 0)
        assert torch.equal(expected, on) == (strength == 1)
        merged = main.merge_lora(base, lora)
        assert type(merged.inner[0]) is nn.Linear
        assert torch.equal(merged(IMAGES), expected)
        assert torch.equal(lora(IMAGES), expected)  # which stays as it was
        assert main.changed_tensors(before, base) == []
    inner = main.set_strength(lora, 0).inner[0]
    assert inner.weight is inner.parametrizations.weight.original


def test_changed_tensors_names_what_differs_by_a_bit() -> None:
    base, _, lora = models()
    names = []
    for name, tensor in base.named_parameters():
        last = tensor.detach().view(-1)[-1]
        last.copy_(torch.nextafter(last, torch.tensor(9.0)))
        names.append(name)
        assert main.changed_tensors(base, lora) == names
    zero = Odd()
    other = copy.deepcopy(zero)
    other.norm.bias.detach().neg_()  # to -0.0
    assert main.changed_tensors(zero, other) == ["norm.bias"]
    other.norm.bias = None
    with pytest.raises(KeyError, match="norm.bias"):
        main.changed_tensors(zero, other)
