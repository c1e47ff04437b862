"""The published numbers are read back from the tables and the pictures."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import RESULTS
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import main

ROWS, BOTH = RESULTS["rows"], ["baseline", "LoRA"]
COST = [*BOTH, "one biased logit", "LoRA + other digits"]
RANK = ["LoRA", "full fine-tuning", "full fine-tuning, cut to rank 1"]
STRENGTHS = ["baseline", *[f"LoRA at strength 0.{x}" for x in (2, 4, 6, 8)], "LoRA"]
BIASES = ["baseline", *[f"bias of {x}" for x in range(1, 7)]]
ADAPTERS = [*[f"adapter, rank {x}" for x in (1, 4, 16)], "copy of the network"]
NEW = [f"new small network, as rank {x}" for x in (1, 4, 16)]


def mean(*what):
    return main.values(ROWS, *what).mean(0).tolist()


def test_values_and_cells():
    rows = [{"method": "a", "x": x, "accuracy": x / 8} for x in (1, 2, 6)]
    rows += [{"method": "a", "task": "t", "x": 2_807_010}, {"method": "b", "x": 0.5}]
    assert main.cell(main.values(rows, "a", "x")) == "3.0±2.6"
    assert main.cell(main.values(rows, "a", "x", "t")) == "2,807,010"
    assert main.values(rows, "a", "accuracy").tolist() == [12.5, 25, 75]


@pytest.fixture(scope="module")
def job():
    """A main job of random images, models and answers, of which more than half are right."""
    torch.manual_seed(0)
    test = main.Split(torch.randn(300, 28, 28), torch.arange(300) % 10)
    before, after = torch.randn(2, 300, 10) + 2 * torch.eye(10)[test.labels]
    after[:, 4] += 1
    models = [main.MNISTClassifier() for _ in range(3)]
    made = dict(zip(["baseline", "start", "lora"], models), before=before, after=after)
    for name in ("start", "lora"):
        main.attach_lora(made[name], 6, 6.0)
    return SimpleNamespace(digit=4, test=test, own=test.some(test.labels == 4), **made)


def drawn(draw, job):
    figure = Figure()
    draw(figure, ROWS, job)
    assert "9" not in figure.get_suptitle()
    return figure


def pixels(axes):
    (image,) = axes.images
    assert image.get_cmap()(0.0)[:3] == (1, 1, 1)  # the lowest value is white
    return torch.tensor(image.get_array().data)


def test_the_tables_hold_each_number_in_its_place(job, capsys):
    scores = [(x,) for x in ("accuracy", "missed", "false", "trained")]
    tasks = [*[("accuracy", x) for x in main.TASKS], ("trained", "rotated")]
    ways = ["baseline", *ADAPTERS, *NEW, "last layer alone"]
    for show, methods, columns in (
        (main.print_cost, COST, scores),
        (main.print_rank, RANK, scores),
        (main.print_tasks, ways, tasks),
    ):
        show(ROWS, job)
        *lines, answer = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        heading, *lines = lines[-len(methods) - 1 :]
        assert heading.split() == [x[0] if x in scores else x[1] for x in columns[:-1]] + [
            "trained"
        ]
        table = {line[:32].strip(): line[32:].split() for line in lines}
        cells = {x: [main.cell(main.values(ROWS, x, *y)) for y in columns] for x in methods}
        assert table == cells
        numbers = re.findall(r"\S*\d\S*", answer)
        if show is main.print_cost:
            gain = [main.values(ROWS, x, "accuracy") for x in ("one biased logit", "LoRA")]
            assert numbers == [main.cell(gain[0] - gain[1])]
        if show is main.print_rank:
            shares = [mean(x, "shares")[0] for x in ("what fine-tuning changed", "the weights")]
            assert numbers == ["1", *[f"{x:.0%}" for x in shares]]


def test_the_main_job_tells_what_lora_added_and_the_errors(job, capsys):
    main.print_main_job(ROWS, job)
    first, _, _, added, _, _, heading, *lines, last = capsys.readouterr().out.splitlines()
    assert "linear1" in first and "(1000, 6) @ lora_A (6, 784)" in first
    assert {"40,764", "1.452%", "2,807,010"} <= set(added.split())
    assert heading.split()[2:12] == ["0", "1", "2", "3", "4*", "5", "6", "7", "8", "9"]
    for line, method in zip(lines, BOTH, strict=True):
        errors = [f"{x:.0f}" for x in mean(method, "errors")]
        assert line.split() == [method, *errors, f"{mean(method, 'accuracy'):.2f}"]
    false = [f"{mean(x, 'false'):.0f}" for x in BOTH]
    assert re.findall(r"\d+", last) == ["4", *false]


def check_curves(axes, curves, x, y, task=None):
    """Each curve has its points in their order; all are named in the legend, if there is one."""
    lines = axes.get_lines()
    for line, (label, methods) in zip(lines, curves.items(), strict=True):
        assert line.get_label().startswith(label)
        dots = [[mean(method, z, task) for z in (x, y)] for method in methods]
        assert line.get_xydata() == pytest.approx(torch.tensor(dots).double().numpy())
    if axes.get_legend():
        legend = [text.get_text() for text in axes.get_legend().get_texts()]
        assert legend[-len(lines) :] == [line.get_label() for line in lines]


def test_the_trade_off_has_both_dials_with_their_numbers(job):
    (axes,) = drawn(main.draw_trade_off, job).axes
    other = "LoRA + other digits"
    curves = {"LoRA at strength": STRENGTHS, "bias of": BIASES, other: [other]}
    check_curves(axes, curves, "missed", "accuracy")
    assert "errors on 4" in axes.get_xlabel() and "accuracy" in axes.get_ylabel()
    assert axes.get_legend()
    for line, wanted in zip(
        axes.get_lines(), (["0", "0.2", "0.4", "0.6", "0.8", "1"], [*"0123456"])
    ):
        own = [text for text in axes.texts if same_color(text.get_color(), line.get_color())]
        assert [text.get_text() for text in own] == wanted
        assert [text.xy for text in own] == [tuple(dot) for dot in line.get_xydata()]


def test_low_rank_has_its_cuts_and_both_shares(job):
    *panels, axes = drawn(main.draw_low_rank, job).axes
    image = job.own.images[0] * 0.3081 + 0.1307
    for panel, rank in zip(panels, main.RANKS, strict=True):
        vectors = torch.linalg.svd(image).Vh[:rank]
        torch.testing.assert_close(pixels(panel), image @ vectors.T @ vectors, atol=1e-4, rtol=0)
        assert panel.get_title().split() == ["rank", str(rank), str(56 * rank), "numbers"]
    for line in axes.get_lines():
        assert [*line.get_ydata()] == pytest.approx(mean(line.get_label(), "shares"))
        assert tuple(line.get_xdata()) == main.RANKS
    assert len(axes.get_legend().get_texts()) == 2
    assert axes.get_xlabel() == "rank" and axes.get_ylim()[0] == 0


def test_tasks_has_its_images_and_each_way_by_its_size(job):
    figure = drawn(main.draw_tasks, job)
    plots = [axes for axes in figure.axes if axes.get_xscale() == "log"]
    panels = iter(axes for axes in figure.axes if axes.images)
    (legend,) = figure.legends
    for axes, (task, change) in zip(plots, main.TASKS.items(), strict=True):
        level, *_ = axes.get_lines()
        assert level.get_ydata()[0] == pytest.approx(mean("baseline", "accuracy", task))
        level.remove()
        curves = {"adapters": ADAPTERS, "new": NEW, "last": ["last layer alone"]}
        check_curves(axes, curves, "trained", "accuracy", task)
        panel = next(panels)
        assert panel.get_title() == task and "numbers" in axes.get_xlabel()
        for image, shown in zip(
            change(job.test.images[:5]), pixels(panel).split(28, 1), strict=True
        ):
            assert torch.equal(shown, image)
    assert "Accuracy (%)" in legend.get_title().get_text()
    labels = ["baseline", *[line.get_label() for line in plots[0].lines]]
    assert [text.get_text() for text in legend.get_texts()] == labels


def test_the_bars_are_the_errors_on_each_digit(job):
    (axes,) = drawn(main.draw_error_counts, job).axes
    assert (axes.patches[0].get_x(), axes.patches[0].get_width()) == (3.5, 1)
    written = []
    for bars, method, side in zip(axes.containers, BOTH, (-1, 1), strict=True):
        assert bars.get_label() == method
        assert same_color(bars[0].get_facecolor(), {-1: "0.6", 1: "C0"}[side])
        assert [bar.get_height() for bar in bars] == pytest.approx(mean(method, "errors"))
        written += [f"{x:.0f}" for x in mean(method, "errors")]
        for digit, bar in enumerate(bars):
            assert 0 < side * (bar.get_x() + bar.get_width() / 2 - digit) < 0.5
    assert [text.get_text() for text in axes.texts] == written
    assert "digit" in axes.get_xlabel() and "errors" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == BOTH


def test_the_examples_are_the_first_that_lora_alone_calls_the_digit(job):
    labels, before, after = job.test.labels, job.before.argmax(1), job.after.argmax(1)
    panels = drawn(main.draw_examples, job).axes
    for row, which in (panels[:8], labels == 4), (panels[8:], labels == before):
        first = (which & (before != 4) & (after == 4)).nonzero().flatten()[:8].tolist()
        assert len(first) >= 5
        for axes, i in zip(row, first):
            assert torch.equal(pixels(axes), job.test.images[i])
            assert axes.get_title() == f"{before[i]} → {after[i]}"
    assert not any(axes.axison for axes in panels)


def test_what_lora_learned_is_the_start_the_change_and_their_sum(job):
    layers = [main.lora_layers(x)["linear1"] for x in (job.start, job.lora)]
    start, end = (layer.lora_A[0].detach().view(28, 28) for layer in layers)
    panels = drawn(main.draw_learned, job).axes
    for axes, wanted in zip(panels, (start, end - start, end), strict=True):
        assert torch.equal(pixels(axes), wanted)
        assert axes.images[0].get_clim() == (wanted.min(), wanted.max())  # each its own scale
    assert [axes.get_title()[0] for axes in panels] == ["r", "+", "="]
