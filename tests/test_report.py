"""The published numbers are read back from the tables and the pictures."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import RESULTS
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import main

ROWS, BIAS, MIXED = RESULTS["rows"], "one biased logit", "LoRA + other digits"
FULL = ["full fine-tuning", "full fine-tuning, cut to rank 1"]
ADAPTERS = ["adapter, rank 1", "adapter, rank 4", "adapter, rank 16", "copy of the network"]
NEW = [f"new small network, as rank {x}" for x in (1, 4, 16)]
STRENGTHS = [f"LoRA at strength 0.{x}" for x in (2, 4, 6, 8)]
LAST = ["last layer alone"]
PAIRS = [method for pair in zip(ADAPTERS, NEW) for method in pair]


def mean(*what):
    return main.values(ROWS, *what).mean(0)


@pytest.fixture(scope="module")
def job():
    """A main job on a 4, of random images, models and answers."""
    torch.manual_seed(0)
    test = main.Split(torch.randn(3000, 28, 28), torch.arange(3000) % 10)
    job = SimpleNamespace(digit=4, test=test, own=test.some(test.labels == 4))
    job.before, job.after = torch.randn(2, 3000, 10)
    job.baseline, job.start, job.lora = [main.MNISTClassifier() for _ in "123"]
    for model in (job.start, job.lora):
        main.attach_lora(model, 6, 6.0)
    return job


def test_a_cell():
    assert main.cell(torch.tensor([1.0, 2.0, 6.0])) == "3.0±2.6"
    assert main.cell(torch.tensor([2807010, 2807010])) == "2,807,010"


SCORES = {name: [name] for name in ("accuracy", "missed", "false", "trained")}
TASKS = {task: ["accuracy", task] for task in main.TASKS} | {"trained": ["trained", "rotated"]}
GAIN = main.values(ROWS, BIAS, "accuracy") - main.values(ROWS, "LoRA", "accuracy")
SHARES = [f"{mean(x, 'shares')[0]:.0%}" for x in ("what fine-tuning changed", "the weights")]


@pytest.mark.parametrize(
    ("show", "methods", "columns", "numbers"),
    [
        (main.print_cost, ["baseline", "LoRA", BIAS, MIXED], SCORES, [main.cell(GAIN)]),
        (main.print_rank, ["LoRA", *FULL], SCORES, ["1", *SHARES]),
        (main.print_tasks, ["baseline", *PAIRS, *LAST, ADAPTERS[-1]], TASKS, []),
    ],
)
def test_a_table_has_each_number_in_its_place(show, methods, columns, numbers, capsys):
    show(ROWS, None)
    *lines, answer = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = [list(columns)]
    for method in methods:
        cells = [main.cell(main.values(ROWS, method, *column)) for column in columns.values()]
        table.append([*method.split(), *cells])
    assert lines[-len(table) :] == table
    assert [word for word in answer if re.search(r"\d", word)] == numbers


def test_the_main_job_tells_what_lora_added_and_the_errors(job, capsys):
    main.print_main_job(ROWS, job)
    first, _, _, added, _, _, *lines, last = capsys.readouterr().out.splitlines()
    assert "linear1" in first and "(1000, 6) @ lora_A (6, 784)" in first
    assert {"40,764", "1.452%", "2,807,010"} <= set(added.split())
    table = [["errors", "on", *"0123", "4*", *"56789", "accuracy,", "%"]]
    false = ["4"]
    for method in ("baseline", "LoRA"):
        errors = [f"{x:.0f}" for x in mean(method, "errors")]
        table.append([method, *errors, f"{mean(method, 'accuracy'):.2f}"])
        false.append(f"{mean(method, 'false'):.0f}")
    assert [line.split() for line in lines] == table
    assert re.findall(r"\d+", last) == false


def drawn(draw, job):
    figure = Figure()
    draw(figure, ROWS, job)
    assert "9" not in figure.get_suptitle()
    return figure


def pixels(axes):
    (image,) = axes.images
    assert image.get_cmap()(0.0)[:3] == (1, 1, 1)  # the lowest value is white
    return torch.tensor(image.get_array().data)


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def dots(methods, x, y, task=None):
    return [[mean(method, z, task).item() for z in (x, y)] for method in methods]


def test_the_trade_off_has_both_dials_with_their_numbers(job):
    (axes,) = drawn(main.draw_trade_off, job).axes
    assert "errors on 4" in axes.get_xlabel() and "accuracy" in axes.get_ylabel()
    wanted = {
        "LoRA at strength …": ["baseline", *STRENGTHS, "LoRA"],
        "bias of …": ["baseline", *[f"bias of {x}" for x in range(1, 7)]],
        MIXED: [MIXED],
    }
    assert curves(axes) == {x: dots(wanted[x], "missed", "accuracy") for x in wanted}
    for line, numbers in zip(axes.lines, (["0", "0.2", "0.4", "0.6", "0.8", "1"], [*"0123456"])):
        own = [text for text in axes.texts if same_color(text.get_color(), line.get_color())]
        assert [text.get_text() for text in own] == numbers
        assert [[*text.xy] for text in own] == line.get_xydata().tolist()
    assert axes.get_legend()


def test_low_rank_has_its_cuts_and_both_shares(job):
    *panels, axes = drawn(main.draw_low_rank, job).axes
    image = job.own.images[0] * 0.3081 + 0.1307
    for panel, rank in zip(panels, main.RANKS, strict=True):
        vectors = torch.linalg.svd(image).Vh[:rank]
        torch.testing.assert_close(pixels(panel), image @ vectors.T @ vectors, atol=1e-4, rtol=0)
        assert panel.get_title().split() == ["rank", str(rank), str(56 * rank), "numbers"]
    for method, found in curves(axes).items():
        assert found == [[*dot] for dot in zip(main.RANKS, mean(method, "shares").tolist())]
    assert len(axes.get_legend().get_texts()) == 2
    assert axes.get_xlabel() == "rank" and "share" in axes.get_ylabel()
    assert axes.get_ylim()[0] == 0


def test_tasks_has_its_images_and_each_way_by_its_size(job):
    figure = drawn(main.draw_tasks, job)
    strips = [axes for axes in figure.axes if axes.images]
    plots = [axes for axes in figure.axes if axes.get_xscale() == "log"]
    for strip, axes, (task, change) in zip(strips, plots, main.TASKS.items(), strict=True):
        assert strip.get_title() == task and "numbers" in axes.get_xlabel()
        assert torch.equal(pixels(strip), torch.cat([*change(job.test.images[:5])], 1))
        level, *found = curves(axes).values()
        assert level[0][1] == mean("baseline", "accuracy", task)
        assert found == [dots(x, "trained", "accuracy", task) for x in (ADAPTERS, NEW, LAST)]
    (legend,) = figure.legends
    named = [text.get_text()[:3] for text in legend.get_texts()]
    assert named == ["bas", "ada", "new", "las"] and "Accuracy" in legend.get_title().get_text()


def test_the_bars_are_the_errors_on_each_digit(job):
    (axes,) = drawn(main.draw_error_counts, job).axes
    assert axes.patches[0].get_x() == 3.5
    looks = {"baseline": "0.6", "LoRA": "C0"}
    for bars, (method, color) in zip(axes.containers, looks.items(), strict=True):
        assert bars.get_label() == method and same_color(bars[0].get_facecolor(), color)
        errors = mean(method, "errors").tolist()
        assert [bar.get_height() for bar in bars] == errors
        assert {f"{x:.0f}" for x in errors} <= {text.get_text() for text in axes.texts}
    assert "digit" in axes.get_xlabel() and "errors" in axes.get_ylabel()
    assert axes.get_legend()


def test_the_examples_are_the_first_that_lora_alone_calls_the_digit(job):
    labels, before, after = job.test.labels, job.before.argmax(1), job.after.argmax(1)
    panels = drawn(main.draw_examples, job).axes
    for row, which in (panels[:8], labels == 4), (panels[8:], labels == before):
        first = (which & (before != 4) & (after == 4)).nonzero()[:8]
        for axes, i in zip(row, first, strict=True):
            assert torch.equal(pixels(axes)[None], job.test.images[i])
            assert axes.get_title() == f"{before[i].item()} → 4"


def test_what_lora_learned_is_the_start_the_change_and_their_sum(job):
    start, end = (main.lora_layers(x)["linear1"].lora_A[0].detach() for x in (job.start, job.lora))
    panels = drawn(main.draw_learned, job).axes
    for axes, wanted, sign in zip(panels, (start, end - start, end), "r+=", strict=True):
        assert torch.equal(pixels(axes).flatten(), wanted)
        assert axes.images[0].get_clim() == (wanted.min(), wanted.max())  # each its own scale
        assert axes.get_title()[0] == sign
