"""Numbers, no two the same, are read back from the tables and the pictures."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from conftest import first_images
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

import main

METHODS = {
    "digit": [
        *("baseline", "lora", "full", "lora_balanced", "logit_bias", "lora_replay"),
        *("constant_part", "full_rank1", "lora_at_0.75"),
        *[f"logit_bias_at_{i}" for i in range(9)],
    ],
    "new_data": [
        *("baseline", "biases", "full", "full_matched"),
        *[f"{name}{rank}" for name in ("lora_rank", "full_part_rank") for rank in main.RANKS],
        *[f"{name}_at_{at}" for name in ("lora_rank8", "full") for at in (0.4, 0.6, 0.8, 1.0)],
        *("baseline_at_1.0", "biases_at_1.0", "full_matched_at_1.0"),
    ],
}
RANK_NAMES = [  # of an eighth of the test images, all
    [f"new_data/lora_rank{rank}" for rank in ("1", "2", "4", "8_at_1.0", "16")],
    [f"new_data/full_part_rank{rank}" for rank in (1, 2, 4, 8, 16)],
]
COSTLY = ("baseline", "lora", "full", "lora_replay", "biases", "lora_rank8", "full_matched")


def make_rows(seeds: Sequence[int], most: int = 900) -> main.Rows:
    """The rows of some seeds, of which no two numbers are equal, but for costs over the seeds."""
    draw, shared = random.Random(seeds[0]), random.Random(1)
    rows = []
    for task, methods in METHODS.items():
        for method in methods:
            right, upright, wrong = shared.random(), shared.random(), shared.randrange(9, most)
            costs = {}
            if method in COSTLY and (task, method) != ("new_data", "baseline"):
                costs["trainable_parameters"] = shared.randrange(10, 3_000_000)
                costs["file_bytes"] = shared.randrange(1_000, 12_000_000)
            for seed in seeds:
                counts = [abs(wrong - 50 * i + draw.randrange(30)) for i in range(12)]
                row: dict[str, Any] = {"seed": seed, "task": task, "method": method, **costs}
                row |= {"accuracy": right * 0.9 + draw.random() / 50, "errors": counts[2:]}
                row |= {"digit_errors": counts[0], "false_positives": counts[1]}
                if task == "new_data":
                    row["accuracy_upright"] = upright * 0.9 + draw.random() / 50
                if method in ("lora_balanced", "logit_bias"):
                    row["strength"] = draw.randrange(8) + 0.5
                rows.append(row)
    return rows


ONE, MANY = make_rows([100]), make_rows([3, 1, 2])
both = pytest.mark.parametrize("rows", [ONE, MANY], ids=["one seed", "three seeds"])


def found(rows: main.Rows, name: str, metric: str) -> list[Any]:
    task, method = name.split("/")
    return [x[metric] for x in rows if (x["task"], x["method"]) == (task, method) and metric in x]


def cell(values: list[float], share: bool = False) -> str:
    """What stands in a cell, written another way."""
    if not values:
        return ""
    if len(set(values)) == 1:
        return f"{100 * values[0]:.2f}%" if share else f"{values[0]:,}"
    mean, deviation = fmean(values), stdev(values)
    if share:
        return f"{100 * mean:.1f}%±{100 * deviation:.1f}%"
    return f"{mean:.0f}±{deviation:.0f}" if mean >= 100 else f"{mean:.1f}±{deviation:.1f}"


def test_text_of_one_seed_of_several_and_of_a_shared_value() -> None:
    def rows(*values: float, metric: str = "x") -> main.Rows:
        return [{"task": "a", "method": "b", metric: value} for value in values]

    assert main.text(rows(2_807_010), "a/b", "x") == "2,807,010"
    assert main.text(rows(11_230_613, 11_230_613), "a/b", "x") == "11,230,613"
    assert main.text(rows(0.5), "a/b", "x") == "0.5"
    assert main.text(rows(1, 2, 6), "a/b", "x") == "3.0±2.6"
    assert main.text(rows(0.97494, metric="accuracy"), "a/b", "accuracy") == "97.49%"
    assert main.text(rows(0.97, 0.98, metric="accuracy"), "a/b", "accuracy") == "97.5%±0.7%"
    assert main.text(rows(1), "a/b", "y") == main.text(rows(1), "a/c", "x") == ""


@both
def test_the_tables_hold_each_number_in_its_place(rows: main.Rows, capsys: Any) -> None:
    for show, task, methods, columns in (
        (
            lambda: main.print_comparison(rows, 4),
            "digit",
            main.METHODS,
            ["digit_errors", "false_positives", "accuracy", "trainable_parameters", "file_bytes"],
        ),
        (
            lambda: main.print_new_data(rows, 30.0),
            "new_data",
            main.NEW_METHODS,
            ["accuracy", "accuracy_upright", "trainable_parameters", "file_bytes"],
        ),
    ):
        show()
        lines = capsys.readouterr().out.splitlines()
        for name, label in methods.items():
            (line,) = [line for line in lines if line.startswith(f"  {label:21}")]
            cells = [cell(found(rows, name, x), x.startswith("accuracy")) for x in columns]
            assert line[23:].split() == [x for x in cells if x], (task, name)
    assert len({name for name in [*main.METHODS, *main.NEW_METHODS]}) == 12


@both
def test_the_table_of_ranks(rows: main.Rows, capsys: Any) -> None:
    main.print_low_rank(rows, 4)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert re.findall(r"rank (\d+)", lines[0]) == ["1", "2", "4", "8", "16"]
    for line, names in zip(lines[1:], RANK_NAMES):
        assert line[23:].split() == [cell(found(rows, name, "accuracy"), True) for name in names]
    for name in ("digit/full", "digit/full_rank1"):
        assert cell(found(rows, name, "digit_errors")) in lines[3]


@both
@pytest.mark.parametrize("digit", [0, 9])
def test_the_errors_on_each_digit(rows: main.Rows, digit: int, capsys: Any) -> None:
    main.print_errors(rows, digit)
    header, *lines = capsys.readouterr().out.splitlines()[:3]
    assert header.split()[2:-1] == [f"{d}*" if d == digit else f"{d}" for d in range(10)]
    for line, name in zip(lines, ("digit/baseline", "digit/lora")):
        errors = [fmean(column) for column in zip(*found(rows, name, "errors"))]
        right = 100 * fmean(found(rows, name, "accuracy"))
        assert line.split()[1:] == [*[f"{count:.0f}" for count in errors], f"{right:.1f}%"]


@pytest.mark.parametrize("digit", [0, 9])
def test_no_line_is_wider_than_80_columns(digit: int, capsys: Any) -> None:
    rows = make_rows(list(range(20)), most=1_000)
    main.print_errors(rows, digit)
    main.print_comparison(rows, digit)
    main.print_low_rank(rows, digit)
    main.print_new_data(rows, 359.25)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


# --- Pictures -------------------------------------------------------------------------------------


def points_of(axes: Any) -> set[tuple[float, float]]:
    """What is drawn as a single point."""
    lines = [line.get_xydata() for line in axes.get_lines()]
    return {tuple(data[0].tolist()) for data in lines if len(data) == 1}


def curves_of(axes: Any) -> dict[str, list[list[float]]]:
    return {
        str(x.get_label()): x.get_xydata().tolist()
        for x in axes.get_lines()
        if len(x.get_xydata()) > 1
    }


def check_plane(
    figure: Figure,
    rows: main.Rows,
    methods: dict[str, str],
    x: str,
    y: str,
    dials: list[list[str]],
) -> None:
    """Each method is a point with its own label; each dial a curve through its methods."""

    def point(name: str) -> tuple[float, float]:
        return fmean(found(rows, name, x)), fmean(found(rows, name, y))

    axes = figure.axes[-1]
    assert points_of(axes) == {point(name) for name in methods}
    texts = [text for text in axes.texts if "better" not in text.get_text()]
    labels = {text.get_text(): tuple(map(float, text.xy)) for text in texts}
    assert labels == {label: point(name) for name, label in methods.items()}
    curves = list(curves_of(axes).values())
    assert len(curves) == len(dials)
    for curve, names in zip(curves, dials):
        assert [tuple(place) for place in curve] == sorted(map(point, names))
    heights = [text.get_position()[1] for text in sorted(texts, key=lambda text: text.xy[1])]
    assert heights == sorted(heights) and len(set(heights)) == len(methods)


@both
def test_the_trade_off_has_each_method_and_both_dials(rows: main.Rows) -> None:
    dials = [
        ["digit/baseline", "digit/lora_balanced", "digit/lora_at_0.75", "digit/lora"],
        [f"digit/logit_bias_at_{bias}" for bias in range(9)],
    ]
    figure = main.draw_trade_off(rows, 4)
    check_plane(figure, rows, main.METHODS, "digit_errors", "accuracy", dials)
    seeds = {row["seed"] for row in rows}
    words = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "seed 100"
    assert figure.axes[0].get_xlabel() == f"errors on 4, {words}"


@pytest.fixture
def job(mnist: main.Data) -> main.Job:
    data = first_images(mnist, 300, 50, 400)
    settings = main.Settings(digit=4, rank=6, alpha=6.0, lora_lr=0.01, lora_epochs=4)
    return main.main_job(settings, 3, data)


@both
def test_new_data_shows_what_is_said_and_both_dials(rows: main.Rows, job: main.Job) -> None:
    turned = main.turn(job.data.test, 30)
    new = main.NewData(turned, turned, job.lora, job.baseline, [])
    figure = main.draw_new_data(rows, job, new)
    dials = []
    for method in ("lora_rank8", "full"):
        steps = [f"new_data/{method}_at_{at}" for at in (0.4, 0.6, 0.8, 1.0)]
        dials.append(["new_data/baseline_at_1.0", *steps])
    shown = {f"{name}_at_1.0": label for name, label in main.NEW_METHODS.items()}
    check_plane(figure, rows, shown, "accuracy", "accuracy_upright", dials)
    for axes, model in zip(figure.axes, (job.baseline, job.lora)):
        says = model(turned.images[:8]).argmax(1)
        assert [text.get_text() for text in axes.texts] == [str(int(digit)) for digit in says]
        right = [text.get_color() == main.BLUE for text in axes.texts]
        assert right == (says == turned.labels[:8]).tolist()
        shown = np.stack([image.get_array() for image in axes.images])
        assert np.array_equal(shown, main.pixels(turned.take(slice(8))).numpy())


@both
def test_low_rank_has_two_lines_and_the_ceiling(rows: main.Rows, job: main.Job) -> None:
    figure = main.draw_low_rank(rows, job)
    top, bottom = figure.axes
    image = job.data.test.images[job.data.test.labels == 4][0]
    grey = (image * main.STD + main.MEAN).view(28, 28)
    for tile, rank in zip(top.images, (1, 2, 4, 8, 16, 28)):
        U, S, Vh = torch.linalg.svd(grey)
        low = (U[:, :rank] * S[:rank] @ Vh[:rank]).numpy()
        assert np.allclose(tile.get_array(), low, atol=1e-5)
    curves = list(curves_of(bottom).values())
    for curve, names in zip(curves, RANK_NAMES):
        heights = [fmean(found(rows, name, "accuracy")) for name in names]
        assert [height for _, height in curve] == heights
        written = [text.get_text() for text in bottom.texts]
        assert all(f"{100 * height:.0f}%" in written for height in heights)
    ceiling = fmean(found(rows, "new_data/full_at_1.0", "accuracy"))
    assert [height for _, height in curves[2]] == [ceiling, ceiling]


@both
def test_the_bars_are_the_errors_on_each_digit(rows: main.Rows, job: main.Job) -> None:
    (axes,) = main.draw_errors(rows, job).axes
    bars = [x for x in axes.containers if isinstance(x, BarContainer)]
    assert [x.get_label() for x in bars] == ["baseline", "LoRA"]
    for container, name, side in zip(bars, ("digit/baseline", "digit/lora"), (-1, 1)):
        errors = [fmean(column) for column in zip(*found(rows, name, "errors"))]
        assert [bar.get_height() for bar in container] == pytest.approx(errors)
        middles = [bar.get_x() + bar.get_width() / 2 for bar in container]
        assert middles == pytest.approx([d + side * 0.2 for d in range(10)])
    (span,) = [x for x in axes.patches if x not in [bar for x in bars for bar in x]]
    assert (span.get_x(), span.get_width()) == (3.5, 1)


def test_the_examples_are_the_first_of_their_kind(job: main.Job) -> None:
    labels = job.data.test.labels.tolist()
    before, after = job.before.argmax(1).tolist(), job.after.argmax(1).tolist()
    triples = list(zip(labels, before, after))
    right = [i for i, (x, b, a) in enumerate(triples) if b != x == a]
    wrong = [i for i, (x, b, a) in enumerate(triples) if b == x != a]
    assert right and wrong
    for axes, which in zip(main.draw_examples(job).axes, (right, wrong)):
        assert re.match(rf"{len(which)} ", axes.get_title())
        words = [f"{before[i]} → {after[i]}" for i in which[:8]]
        assert [text.get_text() for text in axes.texts] == words
        shown = np.stack([image.get_array() for image in axes.images])
        expected = job.data.test.images[which[:8]] * main.STD + main.MEAN
        assert np.allclose(shown.reshape(len(words), 784), expected.numpy())


def test_what_lora_learned_is_the_start_the_change_and_their_sum(job: main.Job) -> None:
    figure = main.draw_learned(job)
    *rows, scale = figure.axes
    assert len(rows) == 4  # of six
    for i, axes in enumerate(rows):
        before, after = (
            main.lora_layers(model)["linear1"].lora_A[i].detach().view(28, 28)
            for model in (job.start, job.lora)
        )
        tiles = [image.get_array() for image in axes.images]
        for tile, expected in zip(tiles, (before, after - before, after), strict=True):
            assert np.array_equal(tile, expected.numpy())
        limits = {image.get_clim() for image in axes.images}
        ((least, most),) = limits  # one scale, with 0 in its middle
        assert least == -most and most == max(np.abs(tile).max() for tile in tiles)
    areas = [x.get_paths()[0].get_extents().size.tolist() for x in scale.collections]
    assert areas == [[784, 1000], [6, 1000], [784, 6]]


def test_a_user_s_own_style_neither_changes_nor_breaks_the_pictures(
    small: main.Data, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: str) -> dict[str, bytes]:
        arguments = ["--main-job-only", "--output-dir", str(tmp_path / folder)]
        assert main.main(arguments) == 0
        return {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.png")}

    plain = run("plain")
    assert sorted(plain) == ["error_counts.png", "examples.png", "learned.png"]
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "font.family": "no font"}):
        assert run("styled") == plain
        assert matplotlib.rcParams["font.size"] == 30
