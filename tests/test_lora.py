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


def odd():
    """A layer that is not linear, two in another, one of them without a bias, and a buffer."""
    inner = nn.Sequential(nn.Linear(13, 17, bias=False), nn.ReLU(), nn.Linear(17, 11))
    model = nn.Sequential(nn.LayerNorm(13), inner)
    model.register_buffer("shift", torch.zeros(13))
    return model


IMAGES = torch.randn(23, 13, generator=torch.Generator().manual_seed(1))
SPLIT = main.Split(IMAGES, torch.arange(23) % 10)


def models(layers=(), dtype=torch.float32):
    """A base model, a copy with LoRA, and a copy of that which was trained for a few steps."""
    torch.manual_seed(0)
    base = odd().to(dtype)
    start = main.attach_lora(deepcopy(base), 2, 3.0, layers)
    lora = deepcopy(start)
    main.train(lora, SPLIT._replace(images=IMAGES.to(dtype)), 0, "LoRA", 0.05, epochs=3, batch=7)
    return base, start, lora


def test_lora_starts_at_the_weight_and_adds_its_scaled_product_to_it():
    base, start, lora = models()
    assert torch.equal(start(IMAGES), base(IMAGES))
    torch.manual_seed(0)
    odd()
    drawn = main.lora_layers(start)["1.0"].lora_A
    torch.testing.assert_close(drawn, torch.randn(2, 13) / 13**0.5)
    A, B = main.lora_layers(main.set_strength(lora, 0.3))["1.2"].parameters()
    torch.testing.assert_close(lora[1][2].weight, base[1][2].weight + 0.45 * B @ A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_matrices_alone_are_trained_and_have_the_dtype_of_their_layer(dtype):
    base, start, lora = models(["1.2"], dtype)
    main.check_lora(base, lora, 3.0)
    changed = [
        after.dtype
        for before, after in zip(start.parameters(), lora.parameters())
        if not torch.equal(before, after)
    ]
    assert changed == [dtype, dtype]


@pytest.mark.parametrize("name", ["0", "1.2"])
def test_what_lora_cannot_be_attached_to_is_named_and_nothing_is_changed(name):
    model = odd()
    weight_norm(model[1][2])
    with pytest.raises(ValueError, match=f"{name} is a"):
        main.attach_lora(model, 2, 3.0, ["1.0", name])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not main.lora_layers(model)


BREAK = {
    "1.2.weight": lambda base, lora: base[1][2].weight.data[-1, -1].mul_(1 + 2e-7),
    "shift": lambda base, lora: lora.shift[-1].fill_(1e-9),
    "1.2": lambda base, lora: setattr(main.lora_layers(lora)["1.2"], "scaling", 1.5 + 1e-9),
    "1.0": lambda base, lora: main.lora_layers(lora)["1.0"].lora_B.data.fill_(math.inf),  # NaN
}


@pytest.mark.parametrize("named", BREAK)
def test_a_broken_promise_ends_the_run_and_names_what_broke_it(named):
    base, _, lora = models()
    BREAK[named](base, lora)
    with pytest.raises(SystemExit, match=f" {named} "):
        main.check_lora(base, lora, 3.0)


@pytest.mark.parametrize("on", [False, True])
def test_precision_is_reduced_in_training_alone(on, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": on})
    (capable,) = re.findall(r"^BFLOAT16 = (.*)", SOURCE, re.MULTILINE)
    monkeypatch.setattr(main, "BFLOAT16", eval(capable, vars(main)))
    seen = []
    model = odd()
    model.register_forward_hook(lambda *call: seen.append((call[-1].dtype, model.training)))
    main.train(model, SPLIT, 0, "odd", lr=0.01)
    assert not main.evaluate(model, SPLIT).requires_grad
    assert seen == [(torch.bfloat16 if on else torch.float32, True), (torch.float32, False)]


def test_a_loss_for_each_step_and_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert len(main.train(odd(), SPLIT, 0, "name", 0.01, epochs=5, batch=12)) == 10
    assert "name" in capsys.readouterr().err


def test_training_that_diverges_names_its_stage_and_rate():
    model = odd()
    model[1][2].bias.requires_grad_(False)  # stays finite
    with pytest.raises(SystemExit, match=r"name: .* 1e\+38$"):
        main.train(model, SPLIT, 0, "name", 1e38)
