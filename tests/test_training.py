"""The one training loop."""

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


def test_the_loop_is_adam_with_a_rate_that_falls_linearly_to_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "BFLOAT16", False)
    model, split = toy()
    expected = copy.deepcopy(model)
    main.train(model, split, 5, "toy", lr=0.01, epochs=3, batch=16)

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
        main.train(model, split, seed, "toy", lr=0.01, batch=16)
        return model

    assert main.changed_tensors(trained(1, before=3), trained(1, before=4)) == []
    assert len(main.changed_tensors(trained(1, before=3), trained(2, before=3))) == 4


def test_the_optimiser_holds_two_moments_of_what_is_trained() -> None:
    model, split = toy()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    cost = main.train(model, split, 0, "toy", lr=0.01, batch=16)
    assert cost["trainable_parameters"] == 8 * 10 + 10
    assert (
        cost["optimizer_bytes"] == 2 * 4 * 90 + 2 * 4
    )  # and a step counter for each of two tensors
    trained = {name: x.data for name, x in model.named_parameters() if x.requires_grad}
    assert cost["file_bytes"] == len(main.to_bytes(trained)) > 4 * 90
    assert main.changed_tensors(before, model) == ["2.weight", "2.bias"]


@pytest.mark.parametrize("on", [False, True])
def test_precision_is_reduced_in_training_alone(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "BFLOAT16", on)
    seen = []

    class Watch(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            seen.append((out.dtype, torch.get_float32_matmul_precision()))
            return out

    _, split = toy()
    model = Watch(6, 10)
    main.train(model, split, 0, "toy", lr=0.01, batch=16)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16 if on else torch.float32}
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    seen.clear()
    main.evaluate(model, split)
    assert seen == [(torch.float32, "highest")]


def test_the_defaults_are_one_epoch_in_batches_of_128() -> None:
    model, _ = toy()
    split, same = main.Split(torch.randn(300, 6), torch.arange(300) % 10), copy.deepcopy(model)
    main.train(model, split, 0, "toy", lr=0.01)
    main.train(same, split, 0, "toy", lr=0.01, epochs=1, batch=128)
    assert main.changed_tensors(model, same) == []


@pytest.mark.parametrize("batch", [16, 50])  # 50: all in one step
def test_training_that_diverges_names_the_stage_and_its_rate(batch: int) -> None:
    model, split = toy()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    split.images[order[40]] = float("nan")
    with pytest.raises(main.RunError, match=r"^toy: .*diverged; lower its learning rate, 0\.01$"):
        main.train(model, split, 0, "toy", lr=0.01, batch=batch)
