"""Numbers, no two the same, are read back from the tables and the pictures."""

import random
import re
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import same_color
from matplotlib.figure import Figure

import main

RANKS, ADAPTERS = (1, 2, 4, 8, 16), (1, 4, 16)
CURVES = {  # of trade_off.png
    "LoRA at strength": ["baseline", *[f"LoRA at strength 0.{x}" for x in (2, 4, 6, 8)], "LoRA"],
    "bias of": ["baseline", *[f"bias of {x}" for x in range(1, 7)]],
    "LoRA + other digits": ["LoRA + other digits"],
}
WAYS = {  # of tasks.png
    "adapter": [*[f"adapter, rank {x}" for x in ADAPTERS], "copy of the network"],
    "new": [f"new small network, as rank {x}" for x in ADAPTERS],
    "last": ["last layer alone"],
}
COST = ["baseline", "LoRA", "one biased logit", "LoRA + other digits"]
RANK = ["LoRA", "full fine-tuning", "full fine-tuning, cut to rank 1"]
DRAW, ROWS = random.Random(0), []
for method in {*COST, *RANK, *chain(*CURVES.values())}:
    for seed in range(20):
        row = {"seed": seed, "method": method, "errors": DRAW.sample(range(900), 10)}
        row |= {"accuracy": DRAW.random(), "missed": DRAW.random(), "false": 90 * DRAW.random()}
        ROWS.append(row | {"trained": len(method)})
for method in ["baseline", *chain(*WAYS.values())]:
    for i, task in enumerate([*main.TASKS] * 20):
        row = {"seed": i // 3, "method": method, "task": task, "accuracy": DRAW.random()}
        ROWS.append(row | {"trained": 2_000_000 + len(method)})
for method in ("the weights", "what fine-tuning changed"):
    for i in range(60):
        row = {"seed": i // 3, "method": method, "layer": f"linear{i % 3}"}
        ROWS.append(row | {"shares": [DRAW.random() for _ in RANKS]})


def found(method, metric, task=None):
    """The same as main.values, by the other way round."""
    rows = [row for row in ROWS if row["method"] == method and row.get("task") == task]
    scale = 100 if metric == "accuracy" else 1
    return scale * torch.tensor([row[metric] for row in rows], dtype=torch.float64)


def cell(values):
    mean, deviation = values.mean().item(), values.std().item()
    return f"{mean:.1f}±{deviation:.1f}" if deviation else f"{mean:,.0f}"


@pytest.fixture(scope="module")
def job():
    """A main job of random images, models and answers, of which more than half are right."""
    torch.manual_seed(0)
    split = main.Split(torch.randn(300, 28, 28), torch.arange(300) % 10)
    before, after = torch.randn(2, 300, 10) + 2 * torch.eye(10)[split.labels]
    after[:, 4] += 1
    baseline = main.MNISTClassifier()
    start, lora = (main.attach_lora(main.MNISTClassifier(), 6, 6.0) for _ in range(2))
    own = split.some(split.labels == 4)
    made = {"baseline": baseline, "start": start, "lora": lora, "before": before, "after": after}
    return SimpleNamespace(digit=4, seed=0, test=split, images=own, **made)


def drawn(draw, job):
    figure = Figure()
    draw(figure, ROWS, job)
    return figure


def pixels(axes):
    (image,) = axes.images
    assert image.get_cmap()(0.0)[:3] == (1, 1, 1)  # the lowest value is white
    return torch.tensor(image.get_array().data)


def test_the_tables_hold_each_number_in_its_place(job, capsys):
    def table(show, methods, columns, tasks=(None,)):
        show(ROWS, job)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        for method in methods:
            (line,) = [line for line in lines if re.match(rf"{re.escape(method)}  ", line)]
            assert line[32:].split() == [cell(found(method, *x)) for x in columns], method
        return lines

    scores = [("accuracy",), ("missed",), ("false",), ("trained",)]
    *_, answer = table(main.print_cost, COST, scores)
    assert cell(found("one biased logit", "accuracy") - found("LoRA", "accuracy")) in answer
    *_, answer = table(main.print_rank, RANK, scores)
    share = [found(x, "shares")[:, 0].mean() for x in ("what fine-tuning changed", "the weights")]
    assert re.findall(r"\d+%", answer) == [f"{x:.0%}" for x in share]
    columns = [*[("accuracy", task) for task in main.TASKS], ("trained", "rotated")]
    lines = table(main.print_tasks, ["baseline", *chain(*WAYS.values())], columns)
    assert lines[2].split() == [*main.TASKS, "trained"]


def test_the_main_job_tells_what_lora_added_and_the_errors(job, capsys):
    main.print_main_job(ROWS, job)
    first, _, _, added, _, _, heading, *lines, last = capsys.readouterr().out.splitlines()
    assert "linear1" in first and "(1000, 6) @ lora_A (6, 784)" in first
    assert "40,764 " in added and "+1.452%" in added and "2,807,010" in added
    assert heading.split()[2:12] == ["0", "1", "2", "3", "4*", "5", "6", "7", "8", "9"]
    for line, method in zip(lines, ("baseline", "LoRA"), strict=True):
        errors = [f"{x:.0f}" for x in found(method, "errors").mean(0)]
        assert line.split() == [method, *errors, f"{found(method, 'accuracy').mean():.2f}"]
    false = [f"{found(method, 'false').mean():.0f}" for method in ("baseline", "LoRA")]
    assert re.findall(r"\d+", last) == ["4", *false]


def test_a_cell_is_one_value_or_mean_and_deviation():
    def told(*values):
        return main.cell(torch.tensor(values, dtype=torch.float64))

    assert [told(97.47), told(2_807_010, 2_807_010)] == ["97.47", "2,807,010"]
    assert told(1, 2, 6) == "3.0±2.6"


def check_curves(axes, curves, x, y, task=None):
    """Each curve has its points in their order, and its colour in the legend is its own."""
    lines = {line.get_label(): line for line in axes.get_lines()}
    for label, methods in curves.items():
        (line,) = [line for name, line in lines.items() if name.startswith(label)]
        wanted = [[found(method, z, task).mean().item() for z in (x, y)] for method in methods]
        assert line.get_xydata() == pytest.approx(torch.tensor(wanted).numpy(), rel=1e-4)
    return lines


def test_the_trade_off_has_both_dials_with_their_numbers(job):
    (axes,) = drawn(main.draw_trade_off, job).axes
    lines = check_curves(axes, CURVES, "missed", "accuracy")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("errors on 4", "accuracy, %")
    numbers = {"LoRA": ["0", "0.2", "0.4", "0.6", "0.8", "1"], "bias": [*"0123456"]}
    for (label, wanted), line in zip(numbers.items(), lines.values()):
        own = [text for text in axes.texts if same_color(text.get_color(), line.get_color())]
        assert line.get_label().startswith(label)
        assert [text.get_text() for text in own] == wanted
        assert [text.xy for text in own] == [tuple(dot) for dot in line.get_xydata()]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == list(lines)


def test_low_rank_has_its_cuts_and_both_shares(job):
    *panels, axes = drawn(main.draw_low_rank, job).axes
    image = job.images.images[0] * 0.3081 + 0.1307
    for axis, rank in zip(panels, RANKS, strict=True):
        vectors = torch.linalg.svd(image).Vh[:rank]
        torch.testing.assert_close(pixels(axis), image @ vectors.T @ vectors, atol=1e-4, rtol=0)
        assert axis.get_title() == f"rank {rank}\n{56 * rank} numbers"
    for line in axes.get_lines():
        wanted = found(line.get_label(), "shares").mean(0)
        assert line.get_ydata() == pytest.approx(wanted.numpy()) and [*line.get_xdata()] == [*RANKS]
    assert len(axes.get_legend().get_texts()) == 2 and axes.get_xlabel() == "rank"


def test_tasks_has_its_images_and_each_way_by_its_size(job):
    figure = drawn(main.draw_tasks, job)
    axes = figure.axes
    plots = [axis for axis in axes if axis.get_xscale() == "log"]
    panels = [axis for axis in axes if axis.images]
    for i, (axis, (task, change)) in enumerate(zip(plots, main.TASKS.items(), strict=True)):
        lines = check_curves(axis, WAYS, "trained", "accuracy", task)
        level = found("baseline", "accuracy", task).mean().item()
        assert list(lines["baseline"].get_ydata()) == pytest.approx([level, level])
        assert axis.get_title() == task and "numbers" in axis.get_xlabel()
        for panel, image in zip(
            panels[5 * i : 5 * i + 5], change(job.test.images[:5]), strict=True
        ):
            assert torch.equal(pixels(panel), image)
    assert "Accuracy (%)" in figure.get_suptitle()
    assert len(plots[-1].get_legend().get_texts()) == 4


def test_the_bars_are_the_errors_on_each_digit(job):
    (axes,) = drawn(main.draw_error_counts, job).axes
    assert (axes.patches[0].get_x(), axes.patches[0].get_width()) == (3.5, 1)
    written = [text.get_text() for text in axes.texts]
    for bars, method, side in zip(axes.containers, ("baseline", "LoRA"), (-1, 1), strict=True):
        errors = found(method, "errors").mean(0).tolist()
        assert bars.get_label() == method and [bar.get_height() for bar in bars] == errors
        places = [bar.get_x() + bar.get_width() / 2 - digit for digit, bar in enumerate(bars)]
        assert all(0 < side * place < 0.5 for place in places)
        assert written[:10] == [f"{x:.0f}" for x in errors]
        written = written[10:]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*"0123456789"]
    assert "digit" in axes.get_xlabel() and "errors" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["baseline", "LoRA"]


def test_the_examples_are_the_first_that_lora_alone_calls_the_digit(job):
    labels, before, after = job.test.labels, job.before.argmax(1), job.after.argmax(1)
    now = (before != 4) & (after == 4)
    panels = drawn(main.draw_examples, job).axes
    for row, which in (panels[:8], labels == 4), (panels[8:], labels == before):
        first = (now & which).nonzero().flatten()[:8].tolist()
        assert len(first) >= 5
        for axes, i in zip(row, first):
            assert torch.equal(pixels(axes), job.test.images[i])
            assert axes.get_title() == f"{before[i]} → {after[i]}"
        assert not any(axes.images for axes in row[len(first) :])
    assert not any(axes.axison for axes in panels)


def test_what_lora_learned_is_the_start_the_change_and_their_sum(job):
    start, end = (
        main.lora_layers(x)["linear1"].lora_A[0].view(28, 28) for x in (job.start, job.lora)
    )
    panels = drawn(main.draw_learned, job).axes
    for axes, wanted in zip(panels, (start, end - start, end), strict=True):
        assert torch.equal(pixels(axes), wanted.detach())
        assert axes.images[0].get_clim() == (wanted.min(), wanted.max())  # each its own scale
    assert [axes.get_title()[0] for axes in panels] == ["r", "+", "="]
