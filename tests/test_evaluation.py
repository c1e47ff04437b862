"""Chapter "Evaluation": counting, choosing, and the checks, each of which has to fail once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import main


def test_logits_of_more_images_than_are_evaluated_at_once() -> None:
    base, images = nn.Linear(4, 10), torch.randn(5300, 4)
    model = main.attach_lora(copy.deepcopy(base), rank=2, alpha=3.0)
    (lora,) = main.lora_layers(model).values()
    nn.init.normal_(lora.lora_B)
    calls = []
    lora.register_forward_hook(lambda *_: calls.append(1))
    for strength in (0.0, 0.3, 1.0):  # what one strength makes of W is not kept for the next
        logits = main.evaluate(main.set_strength(model, strength), images)
        weight = base.weight + strength * 1.5 * lora.lora_B @ lora.lora_A
        torch.testing.assert_close(logits, images @ weight.T + base.bias, atol=1e-4, rtol=1e-4)
        assert not logits.requires_grad
    assert len(calls) == 3  # not once for each 625 images
    assert torch.equal(main.evaluate(main.set_strength(model, 0), images), base(images))


def test_score_against_a_count_by_hand() -> None:
    predictions = torch.tensor([9, 9, 4, 7, 9, 2, 9, 0])
    labels = torch.tensor([9, 4, 4, 4, 7, 7, 3, 0])
    logits = torch.nn.functional.one_hot(predictions, 10).float()
    errors = [0, 0, 0, 1, 2, 0, 0, 2, 0, 0]
    assert main.score(logits, labels, digit=9) == main.Score(3 / 8, errors, 3)
    assert main.score(logits, labels, digit=7) == main.Score(3 / 8, errors, 1)


@pytest.mark.parametrize(
    ("accuracies", "drop", "chosen"),
    [
        ((0.97, 0.98, 0.965, 0.959, 0.9), 1, 2),
        ((0.97, 0.96, 0.95), 1, 1),  # exactly the drop that is allowed
        ((0.97, 0.9599, 0.95), 1, 0),  # and one image of 10,000 more
        ((0.97, 0.9, 0.8), 100, 2),
        ((0.9602, 0.96), 0.02, 1),  # one image of 5,000 after rounding
        ((0.97, 0.97, 0.97, 0.9699), 0, 2),
        *(((1.0,) * (n + 1) + (0.9,) * (10 - n), 9, n) for n in range(11)),
    ],
)
def test_choose_takes_the_furthest_position_that_costs_no_more(
    accuracies: tuple[float, ...], drop: float, chosen: float
) -> None:
    tried = []

    def dial(at: float) -> main.Score:
        tried.append(at)
        return main.Score(accuracies[int(at)], [0] * 10, 0)

    assert main.choose(dial, [float(at) for at in range(len(accuracies))], drop) == chosen
    assert tried.count(0) == 1 and len(tried) <= 5  # with eleven positions, too


IMAGES = torch.randn(3000, 600).index_fill_(1, torch.tensor([0]), 0)  # parts of 625 and 500
PASSED = {
    "frozen_weights_unchanged": [],
    "lora_off_equals_baseline": 0,
    "merged_equals_lora": 0,
    "parameter_overhead": 0,
}


def models(out: int = 1200) -> tuple[nn.Module, nn.Module]:
    """A base model, and its copy with LoRA of rank 1, which adds 0.2496 % and was trained."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(600, out))
    lora = main.attach_lora(copy.deepcopy(base), rank=1, alpha=1.0)
    split = main.Split(IMAGES, torch.arange(3000) % 10)
    main.train(lora, split, main.Recipe("LoRA", 1, 1500, 0.1, ""), seed=0)
    return base, lora


def fails(base: nn.Module, lora: nn.Module, **found: object) -> None:
    with pytest.raises(main.RunError) as error:
        main.check_lora(base, lora, 1, IMAGES)
    line = "LoRA broke a promise; what differs, by name or number: "
    assert str(error.value) == f"{line}{PASSED | found}"


def test_the_checks_pass_and_merge() -> None:
    base, lora = models()
    weight = lora[0].weight.clone()
    checks = main.check_lora(base, lora, 1, IMAGES)
    assert checks == {**dict.fromkeys(PASSED, True), "parameter_overhead": 1_800 / 721_200}
    assert not main.lora_layers(lora)
    assert torch.equal(lora[0].weight, weight)


def test_one_frozen_value_nudged_fails_one_check() -> None:
    base, lora = models()
    value = lora[0].parametrizations.weight.original.detach()[7, 0]  # of a pixel that is always 0
    value.copy_(torch.nextafter(value, torch.tensor(9.0)))
    fails(base, lora, frozen_weights_unchanged=["0.weight"])


def test_one_logit_nudged_fails_one_check() -> None:
    def nudge(layer: nn.Module, inputs: object, logits: Tensor) -> None:
        if len(logits) == 500:  # the last of the images
            logits[-1, 4] = torch.nextafter(logits[-1, 4], torch.tensor(9.0))

    base, lora = models()
    lora.register_forward_hook(nudge)
    fails(base, lora, lora_off_equals_baseline=1)


def test_one_prediction_that_merging_changes_fails_one_check() -> None:
    def change(layer: nn.Module, inputs: object, logits: Tensor) -> None:
        if len(logits) == 500 and not parametrize.is_parametrized(layer):
            logits[-1] *= -1

    base, lora = models()
    lora[0].register_forward_hook(change)
    fails(base, lora, merged_equals_lora=1)


def test_more_than_a_quarter_percent_of_parameters_for_each_rank_fails_one_check() -> None:
    fails(*models(1190), parameter_overhead=1_790 / 715_190)  # 0.2503 %
    base, _ = models()
    lora = main.attach_lora(copy.deepcopy(base), rank=3, alpha=1.0)
    assert main.check_lora(base, lora, 3, IMAGES)["parameter_overhead"] == 5_400 / 721_200
