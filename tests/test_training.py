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


def recipe(epochs: int = 1, batch_size: int = 16, lr: float = 0.01) -> main.Recipe:
    return main.Recipe("toy", epochs, batch_size, lr, "--lr or --alpha")


def test_the_loop_is_adam_with_a_rate_that_falls_linearly_to_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "BFLOAT16", False, raising=False)
    model, split = toy()
    expected = copy.deepcopy(model)
    main.train(model, split, recipe(epochs=3), seed=5)

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


def test_the_seed_alone_orders_the_batches() -> None:
    def trained(seed: int, before: int) -> nn.Module:
        model, split = toy()
        torch.manual_seed(before)
        main.train(model, split, recipe(), seed)
        return model

    assert main.changed_tensors(trained(1, before=3), trained(1, before=4)) == []
    assert len(main.changed_tensors(trained(1, before=3), trained(2, before=3))) == 4


def test_the_optimiser_holds_two_moments_of_what_is_trained() -> None:
    model, split = toy()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    size = main.train(model, split, recipe(), seed=0)
    assert size == 2 * 4 * (8 * 10 + 10) + 2 * 4  # and a step counter for each of two tensors
    assert main.changed_tensors(before, model) == ["2.weight", "2.bias"]


@pytest.mark.parametrize("on", [False, True])
def test_precision_is_reduced_in_training_alone(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on and not hasattr(main, "BFLOAT16"):
        pytest.skip("no bfloat16")
    monkeypatch.setattr(main, "BFLOAT16", on, raising=False)
    seen = []

    class Watch(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            seen.append((out.dtype, torch.get_float32_matmul_precision()))
            return out

    _, split = toy()
    model = Watch(6, 10)
    main.train(model, split, recipe(), seed=0)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16 if on else torch.float32}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    seen.clear()
    main.evaluate(model, split.images)
    assert seen == [(torch.float32, "highest")]


def test_a_loss_that_is_not_finite_names_stage_step_and_options() -> None:
    model, split = toy()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    split.images[order[40]] = float("nan")  # in the third batch
    line = r"^toy: the loss is nan after 2 of 4 steps; lower --lr or --alpha$"
    with pytest.raises(main.RunError, match=line):
        main.train(model, split, recipe(), seed=0)


def test_a_last_step_that_diverges_is_found() -> None:
    model, split = toy()
    line = r"^toy: the loss is (nan|inf) after 1 of 1 steps; lower --lr or --alpha$"
    with pytest.raises(main.RunError, match=line):
        main.train(model, split, recipe(batch_size=50, lr=1e38), seed=0)
