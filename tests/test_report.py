"""The published numbers are read back from the tables and the pictures of a run on a 4."""

import re
from copy import deepcopy
from statistics import stdev

import numpy as np
import pytest
import torch
from conftest import RESULTS
from matplotlib.colors import same_color

import main

COST = ["baseline", "LoRA", "one biased logit", "LoRA + other digits"]
OWN, EVERY = "full fine-tuning", "full fine-tuning on all digits"
WAYS = ["baseline", "LoRA, rank 4", "last layer alone", "new small network"]
WAYS += ["copy of the network", "copy, cut to rank 4"]
STORED = "stored", 0, "stored"
SCORES = [("accuracy, %", 2, "accuracy"), ("missed 4s", 0, "missed"), ("false 4s", 0, "false")]


def found(method, metric, task=None):
    rows = [x for x in RESULTS["rows"] if (x["method"], x.get("task")) == (method, task)]
    return [row[metric] for row in rows]


def mean(*what):
    return np.mean(found(*what), 0).tolist()


@pytest.fixture(scope="module")
def job():
    """A main job on a 4, of random images, models and answers."""
    torch.manual_seed(0)
    job = main.PARSER.parse_args(["--digit=4", "--rank=6", "--seed=5", "--seeds=20"])
    job.test = main.Split(torch.randn(3000, 28, 28), torch.arange(3000) % 10)
    job.before, job.after = torch.randn(2, 3000, 10)
    job.baseline = main.MNISTClassifier()
    job.lora = main.attach_lora(deepcopy(job.baseline), 6, 3.0)
    torch.nn.init.normal_(main.lora_layers(job.lora)["linear1"].lora_B)
    return job


def draw(picture, job):
    (report,) = [reports[picture] for _, _, reports in main.PARTS if picture in reports]
    figure = report(RESULTS["rows"], job)
    assert "9" not in figure.get_suptitle()
    assert figure.get_supxlabel() == "--digit 4 --rank 6 --seed 5 --seeds 20"
    return figure


def answers(capsys, methods, *columns):
    """The numbers that are printed below a table, in which each number is in its place."""
    table = [" " * 32 + "".join(f"{heading:>12}" for heading, *_ in columns)]
    for method in methods:
        line = f"{method:32}"
        for _, digits, *what in columns:
            text, deviation = f"{mean(method, *what):,.{digits}f}", stdev(found(method, *what))
            if deviation:
                text += f" ({deviation:.{digits}f})"
            line += f"{text:>12}"
        table.append(line)
    lines = capsys.readouterr().out.splitlines()
    end = lines.index(table[0]) + len(table)
    assert lines[end - len(table) : end] == table
    return re.findall(r"[-+]?[\d.]+%?", " ".join(lines[end:]))


def curves(axes):
    assert axes.get_legend()
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def dots(*methods):
    return [[mean(x, "missed"), mean(x, "accuracy")] for x in methods]


def test_the_scores_and_the_trade_off(job, capsys):
    (axes,) = draw("trade_off", job).axes
    lost = [mean("baseline", "accuracy") - mean(method, "accuracy") for method in COST[1:3]]
    assert answers(capsys, COST, *SCORES, STORED) == [f"{x:.2f}" for x in lost]
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
    numbers = answers(capsys, ["LoRA", OWN, f"{OWN}, cut to rank 1", EVERY], *SCORES, STORED)
    held = [np.mean([x["linear2"] for x in found(name, "shares")], 0) for name in (OWN, EVERY)]
    assert numbers == ["4", "1", f"{held[0][0]:.0%}", "2", "1", f"{held[1][0]:.0%}", "2"]
    wanted = [[[*x] for x in zip([1, 2, 4, 8, 16], 100 * shares)] for shares in held]
    assert curves(axes) == dict(
        zip(("learned from 4s", "learned from as many of all digits"), wanted)
    )
    assert axes.get_xlabel() == "rank" and "%" in axes.get_ylabel() and axes.get_ylim() == (0, 100)


def pixels(axes):
    return torch.tensor(axes.images[0].get_array().data)


def test_the_tasks(job, capsys):
    figure, gains = draw("tasks", job), []
    strips, plots = figure.axes[:3], figure.axes[3:]
    for strip, axes, (task, change) in zip(strips, plots, main.TASKS.items(), strict=True):
        assert strip.get_title() == task
        assert torch.equal(pixels(strip), torch.cat([*change(job.test.images[:5])], 1))
        wanted = [mean(method, "accuracy", task) for method in WAYS]
        assert [bar.get_width() for bar in axes.patches] == wanted
        assert [text.get_text() for text in axes.texts] == [f"{x:.0f}" for x in wanted]
        gains.append(f"{wanted[1] - wanted[4]:+.1f}")
    columns = [(task, 1, "accuracy", task) for task in main.TASKS]
    assert answers(capsys, WAYS, *columns, (*STORED, "rotated")) == gains
    names = [text.get_text() for text in plots[0].get_yticklabels()]
    assert names == [f"{x}\n{found(x, 'stored', 'rotated')[0]:,} numbers" for x in WAYS]
    assert same_color(axes.patches[1].get_facecolor(), "C0") and axes.yaxis_inverted()
    assert re.search("Accuracy.*100", figure.get_suptitle())


def test_the_errors_on_each_digit(job, capsys):
    none = main.score(job, "perfect", torch.eye(10)[job.test.labels], 0)
    assert (none["errors"], none["accuracy"], none["missed"], none["false"]) == (
        [0] * 10,
        100,
        0,
        0,
    )
    (axes,) = draw("error_counts", job).axes
    first, _, _, added, _, seeds, _, heading, *lines, last = capsys.readouterr().out.splitlines()
    assert first == "linear1: W + 0.5 * lora_B (1000, 6) @ lora_A (6, 784)"
    assert added == "40,764 numbers trained, 1.452% of the 2,807,010 that are frozen"
    assert "20 seeds" in seeds
    assert heading == "errors on" + "".join(f"{x:5}" for x in range(10)) + "  accuracy, %"
    for line, method in zip(lines, ("baseline", "LoRA", "LoRA, off"), strict=True):
        counts = "".join(f"{x:5.0f}" for x in mean(method, "errors"))
        assert line == f"{method:9}{counts} {mean(method, 'accuracy'):12.2f}"
    before, after = (f"{mean(method, 'false'):.0f}" for method in ("baseline", "LoRA"))
    assert last.startswith(f"other digits called 4: {before} without LoRA, {after} with it")
    for bars, method, color in zip(axes.containers, COST[:2], ("0.6", "C0"), strict=True):
        assert bars.get_label() == method and same_color(bars[0].get_facecolor(), color)
        assert [bar.get_height() for bar in bars] == mean(method, "errors")
        assert {f"{x:.0f}" for x in mean(method, "errors")} <= {x.get_text() for x in axes.texts}
    assert [x.get_text() for x in axes.get_xticklabels()] == [*"0123456789"]
    assert axes.patches[0].get_center()[0] == axes.get_xticks()[4]  # the band
    assert "digit" in axes.get_xlabel() and "errors" in axes.get_ylabel() and axes.get_legend()


def test_the_examples_are_the_first_that_lora_alone_calls_the_digit(job):
    figure = draw("examples", job)
    labels, before, after = job.test.labels, job.before.argmax(1), job.after.argmax(1)
    assert re.search("seed 5.*right.*above.*wrong.*below", figure.get_suptitle())
    which = [kind & (before != 4) & (after == 4) for kind in (labels == 4, labels == before)]
    first = torch.cat([kind.nonzero()[:8, 0] for kind in which])
    for axes, i in zip(figure.axes, first, strict=True):
        assert torch.equal(pixels(axes), job.test.images[i])
        assert axes.get_title() == f"{before[i]} → 4" and axes.images[0].cmap.name == "Greys"


def test_what_lora_adds_is_below_what_is_frozen_in_one_scale(job):
    figure, lora = draw("added", job), main.lora_layers(job.lora)["linear1"]
    units = lora.lora_B[:, 0].argsort()[[0, 249, 499, 749, 999]]
    frozen, added = job.baseline.linear1.weight[units], 0.5 * lora.lora_B[units] @ lora.lora_A
    times = frozen.abs().max() / added.abs().max()
    assert re.search(f"seed 5.*\nfrozen above.* x {times:.0f} below", figure.get_suptitle())
    images = torch.cat([frozen, times * added]).detach().view(10, 28, 28)
    shown = torch.stack([pixels(axes) for axes in figure.axes])
    torch.testing.assert_close(shown, images, atol=1e-4, rtol=0)
    for axes, number in zip(figure.axes, lora.lora_B[units, 0].tolist() * 2, strict=True):
        assert axes.get_title().endswith(f" {number:+.3f}")
        low, high = axes.images[0].get_clim()
        assert axes.images[0].cmap.name == "RdBu" and low == -high == -frozen.abs().max()
    job = deepcopy(job)
    job.lora = main.attach_lora(deepcopy(job.baseline), 6, 6.0, ["linear2"])
    assert main.draw_added([], job) is None  # which reads no images
