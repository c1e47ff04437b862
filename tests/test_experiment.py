"""Chapter "Experiment", on a few hundred real images."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import main

# rates at which a handful of steps already shows
SETTINGS = main.Settings(batch_size=100, lora_batch_size=20, lora_lr=0.02, full_lr=1e-3)


@pytest.fixture(scope="module")
def data(mnist: main.Data) -> main.Data:
    def first(split: main.Split, n: int) -> main.Split:
        return main.Split(split.images[:n], split.labels[:n])

    return main.Data(first(mnist.train, 600), first(mnist.validation, 150), first(mnist.test, 250))


@pytest.fixture(scope="module")
def nines(data: main.Data) -> tuple[main.Run, main.Artifacts]:
    """The experiment on 9, which several tests only look at."""
    return main.run_seed(SETTINGS, 0, data, nullcontext)


@pytest.mark.parametrize("digit", range(10))
def test_other_digits_give_every_method(digit: int, data: main.Data) -> None:
    settings = replace(SETTINGS, digit=digit)
    run, _ = main.run_seed(settings, 0, data, nullcontext)
    methods = run.methods
    assert methods.keys() == {
        "baseline",
        "lora",
        "lora_off",
        "lora_balanced",
        "logit_bias",
        "full",
        "full_rank1",
    }
    trained = {name: method.trainable_parameters for name, method in methods.items()}
    assert trained["baseline"] == trained["full"] == 2_807_010
    assert trained["lora"] == 6_794
    assert trained["logit_bias"] == 1
    assert methods["lora_off"].test == methods["baseline"].test
    # training on the digit alone moves predictions towards it
    for name in ("lora", "full"):
        before, after = methods["baseline"].test, methods[name].test
        assert after.errors[digit] <= before.errors[digit]
        assert after.false_positives > before.false_positives
    assert list(run.update_energy) == ["linear1", "linear2", "linear3"]
    assert [len(kept) for kept in run.update_energy.values()] == [784, 1000, 10]
    assert all(0 < kept[0] < 1 == pytest.approx(kept[-1]) for kept in run.update_energy.values())
    assert list(run.trade_off["lora"]) == [i / 10 for i in range(11)]
    for name, strength in (("baseline", 0.0), ("full", 1.0)):
        assert run.trade_off["full"][strength] == methods[name].test
    assert run.trade_off["lora"][run.lora_strength] == methods["lora_balanced"].test
    assert run.trade_off["logit_bias"][run.logit_bias] == methods["logit_bias"].test


@pytest.mark.parametrize("digit", [4])
def test_pictures_are_drawn_for_other_digits_and_several_seeds(digit: int, data: main.Data) -> None:
    settings = replace(SETTINGS, digit=digit)
    runs, artifacts = zip(
        *(main.run_seed(settings, seed, data, nullcontext) for seed in (0, 1)), strict=True
    )
    image = main.pixels(data.test.only(digit).images[0])
    for figure in (
        main.draw_errors(digit, runs),
        main.draw_trade_off(digit, runs),
        main.draw_low_rank(digit, image, runs),
        main.draw_examples(digit, data.test, artifacts[0], 0),
    ):
        assert main.to_png(figure).startswith(b"\x89PNG")
        figure.dpi = 120  # as it was saved
        width, height = figure.get_size_inches() * figure.dpi
        for text in [*figure.texts, *(axes.title for axes in figure.axes)]:
            box = text.get_window_extent()
            assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height, text


def test_a_strength_that_is_given_is_not_chosen(data: main.Data) -> None:
    run, _ = main.run_seed(replace(SETTINGS, strength=0.55), 0, data, nullcontext)
    assert run.lora_strength == 0.55
    assert len(run.trade_off["lora"]) == 12
    assert run.methods["lora_balanced"].test == run.trade_off["lora"][0.55]


def test_the_control_adds_its_bias_to_one_logit(data: main.Data, nines) -> None:
    run, artifacts = nines
    logits = artifacts.baseline_logits.clone()
    logits[:, 9] += 2.5
    assert run.trade_off["logit_bias"][2.5] == main.score(logits, data.test.labels, 9)


def test_the_points_of_the_dial_are_those_of_the_saved_adapter(data: main.Data, nines) -> None:
    run, artifacts = nines
    model = main.attach_lora(copy.deepcopy(artifacts.baseline), rank=1, alpha=1.0)
    for name, tensor in main.adapter_state(model).items():
        tensor.copy_(artifacts.adapter[name])
    recipe = main.Recipe("", 1, 1, 1.0, "")
    for strength in (0.0, 0.5, 1.0):
        main.set_strength(model, strength)
        for split, dials in ((data.validation, run.validation), (data.test, run.trade_off)):
            logits = main.evaluate(model, split.images, recipe)
            assert dials["lora"][strength] == main.score(logits, split.labels, 9)
    assert len({score.accuracy for score in run.validation["lora"].values()}) > 1


def test_what_is_balanced_is_chosen_on_validation(data: main.Data, nines) -> None:
    run, _ = nines
    relabelled = main.Split(data.test.images, 9 - data.test.labels)
    others = main.Data(data.train, data.validation, relabelled)
    other, _ = main.run_seed(SETTINGS, 0, others, nullcontext)
    assert other.trade_off != run.trade_off
    assert (other.lora_strength, other.logit_bias) == (run.lora_strength, run.logit_bias)
    assert run.lora_strength == main.choose(run.validation["lora"], 1.0)
    assert run.logit_bias == main.choose(run.validation["logit_bias"], 1.0)
    assert run.validation["lora"].keys() == run.trade_off["lora"].keys()
    assert run.validation["lora"] != run.trade_off["lora"]
    assert sum(run.validation["full"][1.0].errors) == round(
        (1 - run.validation["full"][1.0].accuracy) * 150
    )


def test_picture_of_examples_with_none_to_show(data: main.Data) -> None:
    right = torch.nn.functional.one_hot(data.test.labels, 10).float()
    nothing = main.Artifacts(torch.nn.Identity(), {}, right, right)
    figure = main.draw_examples(9, data.test, nothing, seed=0)
    assert main.to_png(figure).startswith(b"\x89PNG")
    assert not any(axes.get_xticklabels() for axes in figure.axes)
