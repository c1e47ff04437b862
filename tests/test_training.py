"""Chapter "Training"."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import main


def toy() -> tuple[nn.Module, main.Split]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10))
    return model, main.Split(torch.randn(50, 6), torch.arange(50) % 10)


def test_the_loop_is_adam_with_a_rate_that_falls_linearly_to_zero() -> None:
    model, split = toy()
    expected = copy.deepcopy(model)
    main.train(model, split, main.Recipe("toy", 3, 16, 0.01, "--lr"), seed=5)

    optimizer = torch.optim.Adam(expected.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    step, steps = 0, 3 * 4  # 16 does not divide 50: the fourth batch of an epoch has 2 images
    for _ in range(3):
        order = torch.randperm(50, generator=generator)
        for start in range(0, 50, 16):
            batch = order[start : start + 16]
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
            optimizer.zero_grad()
            F.cross_entropy(expected(split.images[batch]), split.labels[batch]).backward()
            optimizer.step()
            step += 1
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_the_seed_orders_the_batches() -> None:
    def weights(seed: int) -> torch.Tensor:
        model, split = toy()
        main.train(model, split, main.Recipe("toy", 1, 16, 0.01, "--lr"), seed)
        return model[0].weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_optimiser_holds_two_moments_of_what_is_trained() -> None:
    model, split = toy()
    model[0].requires_grad_(False)
    frozen = copy.deepcopy(model[0].state_dict())
    size = main.train(model, split, main.Recipe("toy", 1, 50, 0.01, "--lr"), seed=0)
    assert size == 2 * 4 * (8 * 10 + 10) + 2 * 4  # and a step counter for each of two tensors
    main.check_frozen(frozen, model[0])


def test_precision_is_reduced_in_training_alone() -> None:
    seen = []

    class Watch(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return super().forward(x)

    _, split = toy()
    model = Watch(6, 10)
    main.train(model, split, main.Recipe("toy", 1, 50, 0.01, "--lr"), seed=0)
    main.evaluate(model, split.images, main.Recipe("toy", 1, 50, 0.01, "--lr"))
    assert seen == ["medium", "highest"]
    with pytest.raises(KeyError), main.reduced_precision():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_loss_that_is_not_finite_names_stage_step_and_option() -> None:
    model, split = toy()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    split.images[order[40]] = float("nan")  # in the third batch
    with pytest.raises(main.RunError, match=r"toy: the loss is nan at step 3 of 4; lower --lr"):
        main.train(model, split, main.Recipe("toy", 1, 16, 0.01, "--lr"), seed=0)
