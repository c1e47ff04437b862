"""The one training loop. tests/test_experiment.py computes a second time what it learns."""

import math

import pytest
import torch
from torch import nn

import main


def toy() -> tuple[nn.Sequential, main.Split]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10))
    return model, main.Split(torch.randn(50, 6), torch.arange(50) % 10)


@pytest.mark.parametrize("on", [False, True])
def test_precision_is_reduced_in_training_alone(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "BFLOAT16", on)
    seen = []
    model, split = toy()
    precision = torch.get_float32_matmul_precision
    model.register_forward_hook(lambda *call: seen.append((call[-1].dtype, precision())))
    main.train(model, split, 0, "toy", lr=0.01)
    main.evaluate(model, split)
    training = torch.bfloat16 if on else torch.float32
    assert seen == [(training, "highest"), (torch.float32, "highest")]
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("lr", "bias"), [(1e38, 0.0), (0.01, -math.inf)])
def test_training_that_diverges_names_its_stage_and_rate(lr: float, bias: float) -> None:
    model, split = toy()
    model[0].bias.data[0] = bias  # -inf: of a hidden unit that is always 0, so all else is finite
    model[2].bias.requires_grad_(False)  # the last parameter stays finite
    with pytest.raises(main.RunError) as error:
        main.train(model, split, 0, "toy", lr, batch=50)  # its only step is the last one
    assert {"toy:", f"{lr:g}"} <= set(str(error.value).split())


def test_a_model_with_dropout_drops_in_training_alone() -> None:
    model, split = toy()
    modes = []
    model.append(nn.Dropout())
    model.register_forward_hook(lambda *_: modes.append(model.training))
    main.evaluate(model, split)
    main.train(model, split, 0, "toy", lr=0.01)
    main.evaluate(model, split)
    assert modes == [False, True, False]
