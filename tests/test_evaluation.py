"""Counting, and the checks of LoRA, each of which has to fail once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import main


def test_logits_of_more_images_than_are_evaluated_at_once() -> None:
    base = nn.Sequential(nn.Linear(4, 10))
    split = main.Split(torch.randn(1300, 4), torch.zeros(1300))
    model = main.attach_lora(copy.deepcopy(base), 2, 3.0, ["0"])
    (lora,) = main.lora_layers(model).values()
    nn.init.normal_(lora.lora_B)
    calls = []
    lora.register_forward_hook(lambda *_: calls.append(1))
    for strength in (0.0, 0.3, 1.0):  # what one strength makes of W is not kept for the next
        logits = main.evaluate(main.set_strength(model, strength), split)
        weight = base[0].weight + strength * 1.5 * lora.lora_B @ lora.lora_A
        expected = split.images @ weight.T + base[0].bias
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert not logits.requires_grad
    assert len(calls) == 3  # not once for each 625 images
    assert torch.equal(main.evaluate(main.set_strength(model, 0), split), base(split.images))


def test_score_against_a_count_by_hand() -> None:
    predictions = torch.tensor([9, 9, 4, 7, 9, 2, 9, 0])
    split = main.Split(torch.empty(8, 0), torch.tensor([9, 4, 4, 4, 7, 7, 3, 0]))
    logits = torch.nn.functional.one_hot(predictions, 10).float()
    row = {
        "task": "digit",
        "method": "lora",
        "images": 8,
        "accuracy": 3 / 8,
        "errors": [0, 0, 0, 1, 2, 0, 0, 2, 0, 0],
        "strength": 0.5,
    }
    nine = main.score("digit/lora", logits, split, digit=9, strength=0.5)
    assert nine == row | {"digit_errors": 0, "false_positives": 3}
    seven = main.score("digit/lora", logits, split, digit=7, strength=0.5)
    assert seven == row | {"digit_errors": 2, "false_positives": 1}
    assert main.accuracy(logits, split) == 3 / 8


IMAGES = torch.randn(1100, 600).index_fill_(1, torch.tensor([0]), 0)  # parts of 625 and 475
SPLIT = main.Split(IMAGES, torch.arange(1100) % 10)
PASSED = {
    "frozen_weights_unchanged": [],
    "lora_off_equals_baseline": 0,
    "merged_equals_lora": 0,
    "few_parameters": 0.0,
}


def models(out: int = 1200) -> tuple[nn.Module, nn.Module]:
    """A base model, and its copy with LoRA of rank 1, which adds 0.2496 % and was trained."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(600, out))
    lora = main.attach_lora(copy.deepcopy(base), 1, 1.0, ["0"])
    main.train(lora, SPLIT, 0, "LoRA", lr=0.1, batch=550)
    return base, lora


def fails(base: nn.Module, lora: nn.Module, **found: object) -> None:
    with pytest.raises(main.RunError) as error:
        main.check_lora(base, lora, 1, SPLIT)
    assert str(error.value).endswith(f": {PASSED | found}")


def test_the_checks_pass_and_leave_lora_as_it_was() -> None:
    base, lora = models()
    on = lora(IMAGES)
    assert main.check_lora(base, lora, 1, SPLIT) == {
        "checks": dict.fromkeys(PASSED, True),
        "parameter_overhead": 1_800 / 721_200,
    }
    assert torch.equal(lora(IMAGES), on)
    assert not torch.equal(base(IMAGES), on)


def test_one_frozen_value_nudged_fails_one_check() -> None:
    base, lora = models()
    value = lora[0].parametrizations.weight.original.detach()[7, 0]  # of a pixel that is always 0
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    fails(base, lora, frozen_weights_unchanged=["0.weight"])


def test_one_logit_nudged_fails_one_check() -> None:
    def nudge(layer: nn.Module, inputs: object, logits: Tensor) -> None:
        if len(logits) == 475:  # the last of the images
            logits[-1, 4] = torch.nextafter(logits[-1, 4], torch.tensor(9.0))

    base, lora = models()
    lora.register_forward_hook(nudge)
    fails(base, lora, lora_off_equals_baseline=1)


def test_one_prediction_that_merging_changes_fails_one_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge = main.merge_lora

    def change(layer: nn.Module, inputs: object, logits: Tensor) -> None:
        if len(logits) == 475:
            assert not parametrize.is_parametrized(layer[0])
            logits[-1] *= -1

    def merged(base: nn.Module, lora: nn.Module) -> nn.Module:
        plain = merge(base, lora)
        plain.register_forward_hook(change)
        return plain

    base, lora = models()
    monkeypatch.setattr(main, "merge_lora", merged)
    fails(base, lora, merged_equals_lora=1)


def test_more_than_a_quarter_percent_of_parameters_for_each_rank_fails_one_check() -> None:
    fails(*models(1190), few_parameters=1_790 / 715_190 - 0.0025)  # 0.2503 %
    base, _ = models()
    lora = main.attach_lora(copy.deepcopy(base), 3, 1.0, ["0"])
    assert main.check_lora(base, lora, 3, SPLIT)["parameter_overhead"] == 5_400 / 721_200
