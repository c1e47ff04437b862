"""The published numbers are read back from the tables and the pictures of a run on a 4."""

import re

import numpy as np
import pytest
import torch
from conftest import RESULTS, published, some, told

import main

COST = ["baseline", "LoRA", "one biased logit", "LoRA + other digits"]
WAYS = ["baseline", "LoRA, rank 4", "last layer alone", "new small network"]
WAYS += ["copy of the network", "copy, cut to rank 4"]
SCORES = [("accuracy, %", "accuracy", 2), ("missed 4s", "missed", 0), ("false 4s", "false", 0)]
SCORES += [("stored", "stored", 0)]


def mean(*what):
    return np.mean(published(*what), 0).tolist()


@pytest.fixture(scope="module")
def job(mnist):
    """A main job that exaggerates, on a few hundred images."""
    options = ["--digit=4", "--rank=6", "--alpha=3", "--lora-lr=0.05", "--seed=5", "--seeds=20"]
    return main.main_job(main.PARSER.parse_args(options), 5, some(mnist, 600, 150, 3000))


def draw(picture, job):
    (report,) = [reports[picture] for _, _, reports in main.PARTS if picture in reports]
    figure = report(RESULTS["rows"], job)
    assert "9" not in figure.get_suptitle()
    assert figure.get_supxlabel() == "--digit 4 --rank 6 --seed 5 --seeds 20"
    return figure


def table(methods, columns):
    """A table with each number below its heading."""
    text = " " * 32 + "".join(f"{heading:>12}" for heading, *_ in columns)
    for method in methods:
        text += f"\n{method:32}"
        for _, *what in columns:
            text += "{} ({})".format(*told(method, *what)).removesuffix(" (0)").rjust(12)
    return text


def below(capsys, text):  # nothing, where the table is not printed
    return capsys.readouterr().out.partition(text)[2]


def curves(axes):
    assert axes.get_legend()
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def dots(*methods):
    return [[mean(x, "missed"), mean(x)] for x in methods]


def texts(found):
    return [text.get_text() for text in found]


def images(axes):
    return torch.stack([torch.tensor(x.images[0].get_array().data) for x in axes])


def test_the_scores_and_the_trade_off(job, capsys):
    (axes,) = draw("trade_off", job).axes
    lost = [f"{mean('baseline') - mean(method):.2f}" for method in COST[1:3]]
    assert re.findall(r"\d\.\d\d", below(capsys, table(COST, SCORES))) == lost
    assert axes.get_xlabel() == "missed 4s (← better)"
    assert axes.get_ylabel() == "accuracy, % (better →)"
    strengths = [f"LoRA at strength 0.{x}" for x in (2, 4, 6, 8)]
    assert curves(axes) == {
        "LoRA at strength 0 to 1": dots("baseline", *strengths, "LoRA"),
        "bias of 0 to 6": dots("baseline", *[f"bias of {x}" for x in range(1, 7)]),
        COST[3]: dots(COST[3]),
        "baseline: strength 0, bias 0": dots("baseline"),
    }


def test_what_a_low_rank_holds(job, capsys):
    (axes,) = draw("low_rank", job).axes
    wanted = {}
    for method, name in (
        ("full fine-tuning", "learned from 4s"),
        ("full fine-tuning on all digits", "learned from as many of all digits"),
    ):
        held = np.mean([shares["linear2"] for shares in published(method, "shares")], 0)
        wanted[name] = np.c_[[1, 2, 4, 8, 16], 100 * held].tolist()
    assert curves(axes) == wanted
    methods = ["LoRA", "full fine-tuning", "full fine-tuning, cut to rank 1"]
    text = table([*methods, "full fine-tuning on all digits"], SCORES)
    first = [f"{rank_1:.0f}%" for (_, rank_1), *_ in wanted.values()]
    assert re.findall(r"\d+%", below(capsys, text)) == first
    assert axes.get_ylim() == (0, 100)


def test_the_tasks(job, capsys):
    axes = draw("tasks", job).axes
    gains = []
    for strip, bars, (task, change) in zip(axes[:3], axes[3:], main.TASKS.items(), strict=True):
        assert strip.get_title() == task
        assert torch.equal(images([strip])[0], torch.cat([*change(job.test.images[:5])], 1))
        wanted = [mean(method, "accuracy", task) for method in WAYS]
        assert [bar.get_width() for bar in bars.patches] == wanted
        assert texts(bars.texts) == [f"{x:.0f}" for x in wanted]
        gains.append(f"{wanted[1] - wanted[4]:+.1f}")
    columns = [(task, "accuracy", 1, task) for task in main.TASKS]
    columns.append(("stored", "stored", 0, "rotated"))
    assert re.findall(r"[-+]\d+\.\d", below(capsys, table(WAYS, columns))) == gains
    names = [f"{x}\n{told(x, 'stored', 0, 'rotated')[0]} numbers" for x in WAYS]
    assert texts(axes[3].get_yticklabels()) == names
    colors = [bar.get_facecolor() for bar in bars.patches]
    assert colors.count(colors[1]) == 1 and bars.yaxis_inverted()


def test_the_errors_on_each_digit(job, capsys):
    (axes,) = draw("error_counts", job).axes
    text = "errors on" + "".join(f"{x:5}" for x in range(10)) + "  accuracy, %"
    for method in ("baseline", "LoRA", "LoRA, off"):
        counts = "".join(f"{x:5.0f}" for x in mean(method, "errors"))
        text += f"\n{method:9}{counts} {mean(method):12.2f}"
    above, _, rest = capsys.readouterr().out.partition(text)
    assert above.startswith("linear1: W + 0.5 * lora_B (1000, 6) @ lora_A (6, 784)\n")
    assert re.search("\n40,764 .* 1.452% .* 2,807,010 .*\n.*\n.* 20 seeds", above)
    before, after = (told(method, "false", 0)[0] for method in COST[:2])
    assert re.search(f"called 4: {before} without LoRA, {after} with ", rest)
    bars = {held.get_label(): [bar.get_height() for bar in held] for held in axes.containers}
    assert bars == {method: mean(method, "errors") for method in COST[:2]}
    assert texts(axes.texts) == [f"{x:.0f}" for held in bars.values() for x in held]
    assert texts(axes.get_xticklabels()) == [*"0123456789"] and axes.get_legend()
    assert axes.patches[0].get_center()[0] == axes.get_xticks()[4]  # the band


def test_the_examples_are_the_first_that_lora_alone_calls_the_digit(job):
    figure = draw("examples", job)
    labels = job.test.labels
    before = job.before.argmax(1)
    after = job.after.argmax(1)
    assert re.search("seed 5.*right.*above.*wrong.*below", figure.get_suptitle())
    which = [kind & (before != 4) & (after == 4) for kind in (labels == 4, labels == before)]
    first = torch.cat([kind.nonzero()[:8, 0] for kind in which])
    assert torch.equal(images(figure.axes), job.test.images[first])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{before[i]} → 4" for i in first]


def test_what_lora_adds_is_below_what_is_frozen_in_one_scale(job):
    figure = draw("added", job)
    lora = main.lora_layers(job.lora)["linear1"]
    units = lora.lora_B[:, 0].argsort()[[0, 249, 499, 749, 999]]
    frozen = job.baseline.linear1.weight[units]
    added = 0.5 * lora.lora_B[units] @ lora.lora_A
    most = frozen.abs().max()
    times = most / added.abs().max()
    assert re.search(f"seed 5.*\nfrozen above.* x {times:.0f} below", figure.get_suptitle())
    wanted = torch.cat([frozen, times * added]).view(10, 28, 28).detach()
    torch.testing.assert_close(images(figure.axes), wanted, atol=1e-4, rtol=0)
    for axes, number in zip(figure.axes, lora.lora_B[units, 0].tolist() * 2, strict=True):
        assert axes.get_title().endswith(f" {number:+.3f}")
        assert axes.images[0].cmap.name == "RdBu" and axes.images[0].get_clim() == (-most, most)
