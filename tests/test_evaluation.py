"""Chapter "Evaluation": counting, choosing, and the checks, each of which has to fail once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import main

RECIPE = main.Recipe("toy", 1, 1, 0.1, "--lr")


def test_logits_of_chunks_that_do_not_divide_the_images() -> None:
    model = nn.Linear(4, 10)
    images = torch.randn(2 * main.CHUNK + 300, 4)
    logits = main.evaluate(model, images, RECIPE)
    torch.testing.assert_close(logits, model(images).detach())


def test_a_logit_that_is_not_finite_names_stage_and_option() -> None:
    model = nn.Linear(4, 10)
    nn.init.constant_(model.bias, float("inf"))
    with pytest.raises(main.RunError, match=r"toy: a logit .* last step; lower --lr"):
        main.evaluate(model, torch.zeros(2, 4), RECIPE)


def test_score_against_a_count_by_hand() -> None:
    predictions = torch.tensor([9, 9, 4, 4, 7, 9, 0, 9])
    labels = torch.tensor([9, 4, 9, 4, 9, 7, 0, 9])
    logits = torch.nn.functional.one_hot(predictions, 10).float()
    score = main.score(logits, labels, digit=9)
    assert score.accuracy == 4 / 8
    assert score.errors == [0, 0, 0, 0, 1, 0, 0, 1, 0, 2]
    assert score.false_positives == 2
    assert main.score(logits, labels, digit=4).false_positives == 1


def test_the_dial_is_the_model_at_each_strength_and_leaves_it_alone() -> None:
    torch.manual_seed(0)
    base = main.MNISTClassifier()
    model = main.attach_lora(copy.deepcopy(base), rank=2, alpha=3.0)
    for lora in main.lora_layers(model).values():
        nn.init.normal_(lora.lora_B, std=0.1)
    images, strengths = torch.randn(main.CHUNK + 100, 784), [0.0, 0.3, 0.8, 1.0]
    expected = {at: model_logits(model, at, images) for at in strengths}
    before = copy.deepcopy(model.state_dict())

    dial = main.turn_dial(model, strengths, images, RECIPE)

    assert list(dial) == strengths
    for at in strengths:
        torch.testing.assert_close(dial[at], expected[at], atol=1e-4, rtol=1e-4)
        assert (expected[at] - expected[0.0]).abs().max() >= 0.1 * at
    assert torch.equal(dial[0.0], main.evaluate(base, images, RECIPE))
    assert torch.equal(dial[1.0], expected[1.0])
    assert [lora.strength for lora in main.lora_layers(model).values()] == [1.0] * 3
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(main.evaluate(model, images, RECIPE), expected[1.0])


def model_logits(model: nn.Module, strength: float, images: torch.Tensor) -> torch.Tensor:
    logits = main.evaluate(main.set_strength(model, strength), images, RECIPE)
    main.set_strength(model, 1.0)
    return logits


@pytest.mark.parametrize("digit", range(10))
def test_the_controls_dial_moves_one_logit(digit: int) -> None:
    logits = torch.randn(5, 10)
    dial = main.add_biases(logits, digit)
    assert list(dial) == [i / 4 for i in range(33)]
    assert torch.equal(dial[0.0], logits)
    expected = logits.clone()
    expected[:, digit] += 2.25
    assert torch.equal(dial[2.25], expected)


def test_interpolate_is_a_straight_line_and_leaves_its_ends_alone() -> None:
    start, end = nn.Linear(3, 2), nn.Linear(3, 2)
    ends = copy.deepcopy((start.state_dict(), end.state_dict()))
    for strength in (0.0, 0.25, 1.0):
        model = main.interpolate(start, end, strength)
        expected = start.weight + strength * (end.weight - start.weight)
        torch.testing.assert_close(model.weight, expected)
        torch.testing.assert_close(model.bias, start.bias + strength * (end.bias - start.bias))
    main.check_frozen(ends[0], start)
    main.check_frozen(ends[1], end)


@pytest.mark.parametrize(
    ("accuracies", "drop", "chosen"),
    [
        ((0.97, 0.98, 0.965, 0.959, 0.9), 1, 2),
        ((0.97, 0.96, 0.95), 1, 1),  # exactly the drop that is allowed
        ((0.97, 0.95, 0.965), 1, 2),  # the furthest, even behind a dip
        ((0.97, 0.9, 0.8), 1, 0),  # nothing but off
        ((0.97, 0.9, 0.8), 100, 2),
        ((0.97, 0.9698, 0.97), 0, 2),
    ],
)
def test_choose_takes_the_furthest_position_that_costs_no_more(
    accuracies: tuple[float, ...], drop: float, chosen: float
) -> None:
    dial = {float(at): main.Score(acc, [0] * 10, 0) for at, acc in enumerate(accuracies)}
    assert main.choose(dial, drop) == chosen


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    base = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 10))
    return base, main.attach_lora(copy.deepcopy(base), rank=1, alpha=1.0)


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_check_frozen_sees_one_nudged_value_and_names_its_tensor(models, name: str) -> None:
    base, lora = models
    main.check_frozen(base.state_dict(), lora)
    plain = dict(lora.named_parameters())
    tensor = plain[name.replace("weight", "parametrizations.weight.original")]
    value = tensor.detach().view(-1)[0]
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    with pytest.raises(main.RunError, match=f"tensor {name} is not"):
        main.check_frozen(base.state_dict(), lora)


def test_check_frozen_sees_a_sign_of_zero_and_a_missing_tensor(models) -> None:
    base, lora = models
    nn.init.zeros_(base[0].bias)
    with torch.no_grad():
        lora[0].bias.copy_(-base[0].bias)
    with pytest.raises(main.RunError, match=r"0\.bias"):
        main.check_frozen(base.state_dict(), lora)
    with pytest.raises(main.RunError, match=r"2\.weight"):
        main.check_frozen({"2.weight": base[2].weight.detach()}, lora[0])


def test_check_off_sees_one_nudged_logit() -> None:
    baseline = torch.randn(5, 10)
    main.check_off(baseline, baseline.clone())
    off = baseline.clone()
    off[3, 4] = torch.nextafter(off[3, 4], torch.tensor(9.0))
    with pytest.raises(main.RunError, match="1 of 50 logits"):
        main.check_off(baseline, off)


def test_check_merged_sees_one_changed_prediction() -> None:
    lora = torch.eye(10)
    main.check_merged(lora, 2 * lora)
    merged = lora.clone()
    merged[3, 4] = 2
    with pytest.raises(main.RunError, match="1 of 10 predictions"):
        main.check_merged(lora, merged)


def test_check_overhead_fails_above_a_quarter_percent_for_each_rank() -> None:
    assert main.check_overhead(6_794, 2_807_010, rank=1) == pytest.approx(0.00242, abs=1e-5)
    main.check_overhead(67_940, 2_807_010, rank=10)
    with pytest.raises(main.RunError, match=r"0\.25[0-9]* % of parameters, over 0\.25 %"):
        main.check_overhead(7_100, 2_807_010, rank=1)
