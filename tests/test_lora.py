"""LoRA's algebra, the checks, and training, on a model of odd shapes."""

import copy
import math
import re

import pytest
import torch
from torch import nn

import main


class Odd(nn.Module):
    """A model with a layer that is not linear, and one without a bias."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.inner = nn.Sequential(nn.Linear(13, 17, bias=False), nn.ReLU(), nn.Linear(17, 11))

    def forward(self, x):
        return self.inner(self.norm(x))


IMAGES = torch.randn(23, 13, generator=torch.Generator().manual_seed(1))
SPLIT = main.Split(IMAGES, torch.arange(23) % 10)


def models(layers=()):
    """A base model, a copy with LoRA, and a copy of that which was trained for a few steps."""
    torch.manual_seed(0)
    base = Odd()
    start = main.attach_lora(copy.deepcopy(base), 2, 3.0, layers)
    lora = copy.deepcopy(start)
    main.train(lora, SPLIT, 0, "LoRA", lr=0.05, epochs=3, batch=7)
    return base, start, lora


def test_the_network_has_relu_between_its_layers():
    model, images = main.MNISTClassifier(), torch.randn(5, 28, 28)
    first, second, last = main.linear_layers(model).values()
    wanted = last(second(first(images.flatten(1)).relu()).relu())
    assert torch.equal(model(images), wanted)


def test_lora_starts_at_the_weight_and_adds_its_scaled_product_to_it():
    base, start, lora = models()
    assert torch.equal(start(IMAGES), base(IMAGES))
    assert list(main.lora_layers(lora)) == list(main.linear_layers(lora)) == ["inner.0", "inner.2"]
    for name, matrices in main.lora_layers(lora).items():
        weight = base.get_submodule(name).weight
        assert matrices.lora_A.shape == (2, weight.shape[1])
        layer = main.set_strength(lora, 0.3).get_submodule(name)
        expected = weight + 0.3 * 1.5 * matrices.lora_B @ matrices.lora_A
        torch.testing.assert_close(layer.weight, expected)
        main.set_strength(lora, 0)
        assert layer.weight is layer.parametrizations.weight.original
    assert torch.equal(lora(IMAGES), base(IMAGES))


@pytest.mark.parametrize("layers", [["inner.0", "inner.2"], ["inner.2"]])
def test_training_changes_each_tensor_of_lora_and_nothing_else(layers):
    _, start, lora = models(layers)
    then, now = dict(start.named_parameters()), dict(lora.named_parameters())
    parts = {f"{layer}.parametrizations.weight.0.lora_{x}" for layer in layers for x in "AB"}
    assert {name for name in now if not torch.equal(now[name], then[name])} == parts
    assert {name for name in now if now[name].requires_grad} == parts
    with pytest.raises(ValueError, match="has LoRA already"):
        main.attach_lora(lora, 2, 3.0)


def move_a_weight(base, lora, patch):
    base.inner[0].weight.data[-1, -1] *= 1 + 2e-7


def move_a_bias_to_minus_zero(base, lora, patch):
    base.norm.bias.data.zero_()
    lora.norm.bias.data.zero_().neg_()


def forget_a_and_b(base, lora, patch):
    forward = lambda self, weight: weight - weight.sin() * self.strength
    patch.setattr(main.LoRAParametrization, "forward", forward)


def scale_otherwise(base, lora, patch):
    main.set_strength(lora, 1.003)


def turn_to_nan(base, lora, patch):
    main.set_strength(lora, math.nan)


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (move_a_weight, "inner.0.weight"),
        (move_a_bias_to_minus_zero, "norm.bias"),
        (forget_a_and_b, "inner.0"),
        (scale_otherwise, "inner.0"),
        (turn_to_nan, "inner.0"),
    ],
)
def test_a_broken_promise_ends_the_run_and_names_what_broke_it(broken, named, monkeypatch):
    base, _, lora = models()
    on = lora(IMAGES)
    main.check_lora(base, lora, 3.0)  # passes, and leaves LoRA as it was
    assert torch.equal(lora(IMAGES), on)
    broken(base, lora, monkeypatch)
    with pytest.raises(SystemExit, match=f" {named} "):
        main.check_lora(base, lora, 3.0)


@pytest.mark.parametrize("on", [False, True])
def test_precision_is_reduced_in_training_alone(on, monkeypatch):
    monkeypatch.setattr(main, "BFLOAT16", on)
    seen, model = [], Odd()
    model.register_forward_hook(lambda *call: seen.append((call[-1].dtype, model.training)))
    main.train(model, SPLIT, 0, "odd", lr=0.01)
    assert not main.evaluate(model, IMAGES).requires_grad
    training = torch.bfloat16 if on else torch.float32
    assert seen == [(training, True), (torch.float32, False)]


@pytest.mark.parametrize(("lr", "low", "high"), [(0.01, 0, 0.5), (300.0, 2, 999)])
def test_a_training_is_told_in_a_line(lr, low, high):
    model = Odd()
    first = nn.functional.cross_entropy(model(IMAGES), SPLIT.labels).item()
    said = main.train(model, SPLIT, 0, "odd", lr, epochs=50, batch=23)
    assert said.startswith("odd: 23 images, 50 steps, ")
    *_, start, _, end = said.split()
    assert float(start) == pytest.approx(first, rel=0.02)  # of bfloat16
    assert low * first < float(end) < high * first


@pytest.mark.parametrize(("lr", "bias"), [(1e38, 0.0), (0.01, -math.inf)])
def test_training_that_diverges_names_its_stage_and_rate(lr, bias):
    model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 10))
    model[0].bias.data[0] = bias  # -inf: of a hidden unit that is always 0, so all else is finite
    model[2].bias.requires_grad_(False)  # the last parameter stays finite
    with pytest.raises(SystemExit, match=f"odd: .*{re.escape(f'{lr:g}')}"):
        main.train(model, SPLIT, 0, "odd", lr)
