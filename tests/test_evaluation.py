"""Evaluation in parts, and the checks of LoRA, each of which has to fail once."""

import ast
import copy

import pytest
import torch
from torch import Tensor, nn

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


IMAGES = torch.randn(700, 600)  # in parts of 625 and 75
IMAGES[:, 0] = 0
SPLIT = main.Split(IMAGES, torch.arange(700) % 10)


def models(rank: int = 1) -> tuple[nn.Module, nn.Module]:
    """A base model, and its copy with LoRA, which was trained."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(600, 1200))
    lora = main.attach_lora(copy.deepcopy(base), rank, 1.0, ["0"])
    main.train(lora, SPLIT, 0, "LoRA", lr=0.1, batch=350)
    return base, lora


def test_the_checks_pass_and_leave_lora_as_it_was() -> None:
    base, lora = models(rank=3)
    on = lora(IMAGES)
    passed = main.check_lora(base, lora, SPLIT)
    assert passed["parameter_overhead"] == 3 * 1_800 / 721_200
    assert list(passed["checks"].values()) == [True] * 4
    assert torch.equal(lora(IMAGES), on)


def test_a_broken_promise_fails_its_check() -> None:
    def broken(base: nn.Module, lora: nn.Module) -> dict[str, object]:
        with pytest.raises(main.RunError) as error:
            main.check_lora(base, lora, SPLIT)
        found = ast.literal_eval(str(error.value).partition(": ")[2])
        return {name: value for name, value in found.items() if value}

    def nudge(_: object, __: object, logits: Tensor) -> None:
        logits[0, 4] = torch.nextafter(logits[0, 4], torch.tensor(9.0))
        logits[-1] *= -1  # 1,200 logits, and what they predict

    base, lora = models()
    lora[0].bias.requires_grad_()
    assert broken(base, lora) == {"only_lora_trained": ["0.bias"]}
    base, lora = models()
    base[0].weight.detach()[7, 0] += 1  # of a pixel that is always 0
    assert broken(base, lora) == {"frozen_weights_unchanged": ["0.weight"]}
    base, lora = models()
    base.register_forward_hook(nudge)  # merging copies it
    assert broken(base, lora) == {"lora_off_equals_baseline": 2 * 1201, "merged_equals_lora": 2}
