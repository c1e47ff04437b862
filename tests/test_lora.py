"""LoRA's algebra, the checks, and training, on a model of odd shapes."""

import math
import re
from copy import deepcopy

import pytest
import torch
from conftest import SOURCE
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import main


class Odd(nn.Module):
    """A model with a layer that is not linear, one without a bias, and a buffer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(13)
        self.inner = nn.Sequential(nn.Linear(13, 17, bias=False), nn.ReLU(), nn.Linear(17, 11))
        self.register_buffer("shift", torch.zeros(13))

    def forward(self, x):
        return self.inner(self.norm(x))


IMAGES = torch.randn(23, 13, generator=torch.Generator().manual_seed(1))
SPLIT = main.Split(IMAGES, torch.arange(23) % 10)


def models(layers=(), dtype=torch.float32):
    """A base model, a copy with LoRA, and a copy of that which was trained for a few steps."""
    torch.manual_seed(0)
    base = Odd().to(dtype)
    start = main.attach_lora(deepcopy(base), 2, 3.0, layers)
    lora = deepcopy(start)
    main.train(lora, SPLIT._replace(images=IMAGES.to(dtype)), 0, "LoRA", 0.05, epochs=3, batch=7)
    return base, start, lora


def test_lora_starts_at_the_weight_and_adds_its_scaled_product_to_it():
    base, start, lora = models()
    assert torch.equal(start(IMAGES), base(IMAGES))
    torch.manual_seed(0)
    Odd()
    drawn = main.lora_layers(start)["inner.0"].lora_A
    torch.testing.assert_close(drawn, torch.randn(2, 13) / 13**0.5)
    assert list(main.lora_layers(lora)) == list(main.linear_layers(lora)) == ["inner.0", "inner.2"]
    main.set_strength(lora, 0.3)
    for name, matrices in main.lora_layers(lora).items():
        weight = base.get_submodule(name).weight
        assert matrices.lora_A.shape == (2, weight.shape[1])
        expected = weight + 0.3 * 1.5 * matrices.lora_B @ matrices.lora_A
        torch.testing.assert_close(lora.get_submodule(name).weight, expected)
    assert torch.equal(main.set_strength(lora, 0)(IMAGES), base(IMAGES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layers", [["inner.0", "inner.2"], ["inner.2"]])
def test_training_changes_each_tensor_of_lora_and_nothing_else(layers, dtype):
    base, start, lora = models(layers, dtype)
    then, now = dict(start.named_parameters()), dict(lora.named_parameters())
    parts = {f"{layer}.parametrizations.weight.0.lora_{x}" for layer in layers for x in "AB"}
    assert {name for name in now if not torch.equal(now[name], then[name])} == parts
    assert {name for name in now if now[name].requires_grad} == parts
    main.check_lora(base, lora, 3.0)


@pytest.mark.parametrize("name", ["norm", "inner.2"])
def test_what_lora_cannot_be_attached_to_is_named_and_nothing_is_changed(name):
    model = Odd()
    weight_norm(model.inner[2])
    with pytest.raises(ValueError, match=f"{name} is a"):
        main.attach_lora(model, 2, 3.0, ["inner.0", name])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not main.lora_layers(model)


def scale(lora, name):
    main.lora_layers(lora)[name].scaling *= 1 + 1e-9


BREAK = {
    "inner.2.weight": lambda base, lora: base.inner[2].weight.data[-1, -1].mul_(1 + 2e-7),
    "shift": lambda base, lora: lora.shift[-1].fill_(1e-9),
    "inner.0": lambda base, lora: scale(lora, "inner.0"),
    "inner.2": lambda base, lora: scale(lora, "inner.2"),
    "inner.2 ": lambda *both: [model.inner[2].bias.data.fill_(math.inf) for model in both],  # NaN
}


@pytest.mark.parametrize("named", BREAK)
def test_a_broken_promise_ends_the_run_and_names_what_broke_it(named):
    base, _, lora = models()
    on = lora(IMAGES)
    main.check_lora(base, lora, 3.0)  # passes, and leaves LoRA as it was
    assert torch.equal(lora(IMAGES), on)
    BREAK[named](base, lora)
    with pytest.raises(SystemExit, match=f" {named.strip()} "):
        main.check_lora(base, lora, 3.0)


@pytest.mark.parametrize("on", [False, True])
def test_precision_is_reduced_in_training_alone(on, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": on})
    monkeypatch.setattr(main, "BFLOAT16", None)  # and back to what it was, after the test
    exec(re.search(r"^BFLOAT16 = .*", SOURCE, re.MULTILINE)[0], vars(main))  # noqa: S102
    seen, model = [], Odd()
    model.register_forward_hook(lambda *call: seen.append((call[-1].dtype, model.training)))
    main.train(model, SPLIT, 0, "odd", lr=0.01)
    assert not main.evaluate(model, SPLIT).requires_grad
    assert seen == [(torch.bfloat16 if on else torch.float32, True), (torch.float32, False)]


def test_the_losses_of_all_steps_and_a_bar_on_a_terminal_alone(monkeypatch, capsys):
    model = Odd()
    first = nn.functional.cross_entropy(model(IMAGES), SPLIT.labels).item()
    losses = main.train(model, SPLIT, 0, "odd", 0.01, epochs=50, batch=23)
    assert losses[0] == pytest.approx(first, rel=0.02)  # of bfloat16
    assert len(losses) == 50 and capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    main.train(model, SPLIT, 0, "odd", 0.01)
    assert "odd" in capsys.readouterr().err


@pytest.mark.parametrize(("lr", "bias"), [(1e38, 0.0), (0.01, -math.inf)])
def test_training_that_diverges_names_its_stage_and_rate(lr, bias):
    model = nn.Sequential(nn.Linear(13, 8), nn.ReLU(), nn.Linear(8, 10))
    model[0].bias.data[0] = bias  # -inf: of a hidden unit that is always 0, so all else is finite
    model[2].bias.requires_grad_(False)  # the last parameter stays finite
    with pytest.raises(SystemExit, match=rf"odd: .* {lr:g}$".replace("+", r"\+")):
        main.train(model, SPLIT, 0, "odd", lr)
