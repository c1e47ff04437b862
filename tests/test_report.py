"""Numbers, no two the same, are read back from the tables and the pictures."""

import itertools
import random
import re
import warnings
from dataclasses import replace
from typing import Any

import matplotlib
import pytest
import torch

import main

RANKS = (1, 2, 4, 8, 16)
STEPS = ("_at_0.4", "_at_0.6", "_at_0.8", "")
TRADE_OFF = {  # the curves of each picture: a word of their labels, and their rows
    "LoRA": [f"digit/{name}" for name in ("baseline", "lora_at_0.3", "lora_at_0.6", "lora")],
    "bias": [f"digit/logit_bias_at_{bias}" for bias in range(6)],
}
NEW_DATA = {
    "LoRA": ["new_data/baseline", *[f"new_data/lora_rank8{step}" for step in STEPS]],
    "full": ["new_data/baseline", *[f"new_data/full{step}" for step in STEPS]],
}
LOW_RANK = {
    "LoRA": [f"new_data/lora_rank{rank}" for rank in RANKS],
    "full": [f"new_data/full_part_rank{rank}" for rank in RANKS],
}
NAMES = {"digit/full_rank1", *main.METHODS, *main.NEW_METHODS}
for curves in (TRADE_OFF, NEW_DATA, LOW_RANK):
    NAMES.update(*curves.values())
BARS = (("digit/baseline", "baseline", -1), ("digit/lora", "LoRA", 1))
ROWS, DRAW = [], random.Random(0)
for task, method in sorted(name.split("/") for name in NAMES):
    cost = DRAW.randrange(10, 3_000_000)  # the same for all of its seeds, unlike the rest
    for seed in range(20):
        counts = [DRAW.randrange(900, 1000) for _ in range(13)]
        row = {"seed": seed, "task": task, "method": method, "errors": counts[:10]}
        row |= zip(("digit_errors", "false_positives", "strength"), counts[10:])
        for share in ("accuracy", "accuracy_upright"):
            row |= {share: DRAW.random() / 9, f"{share}_eighth": DRAW.random() / 9}
        ROWS.append(row | {"trainable_parameters": cost, "file_bytes": 4 * cost})


def test_a_cell_is_one_value_or_the_mean_and_deviation_of_several() -> None:
    def rows(*values: Any, metric: str = "x") -> tuple[main.Rows, str, str]:
        found = [{"task": "a", "method": "b", metric: value} for value in values]
        return [*found, {"task": "a", "method": "c", "x": 7}], "a/b", metric

    assert main.cell(*rows(0.5)) == "0.5"
    assert main.cell(*rows(11_230_613, 11_230_613)) == "11,230,613"  # as all seeds have it
    assert main.cell(*rows(1, 2, 6)) == "3.0±2.6"
    assert main.cell(*rows(100, 200, 600)) == "300±265"
    assert main.cell(*rows(0.97494, metric="accuracy")) == "97.49%"
    assert main.cell(*rows(0.97, 0.98, metric="accuracy_upright")) == "97.5%±0.7%"
    assert main.cell(*rows()) == ""
    assert main.mean(*rows([1, 30], [2, 50], [6, 70])) == [3, 50]
    assert main.mean(*rows(0, 4)) == 2
    notes = [main.seeds_note(x) for x in (ROWS[7:8], ROWS[7:9], ROWS)]
    assert notes == ["seed 7", "mean of 2 seeds", "mean of 20 seeds"]


def test_the_tables_hold_each_number_in_its_place_in_80_columns(capsys: Any) -> None:
    def printed(show: Any, argument: float) -> list[str]:
        show(ROWS, argument)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80
        return lines

    errors = {"missed 4s": "digit_errors", "false 4s": "false_positives", "right": "accuracy"}
    shares = {"turned": "accuracy", "upright": "accuracy_upright"}
    costs = {"trained": "trainable_parameters", "file bytes": "file_bytes"}
    comparison, new_data = printed(main.print_comparison, 4), printed(main.print_new_data, 359.25)
    strengths = [main.cell(ROWS, f"digit/{x}", "strength") for x in ("lora_balanced", "logit_bias")]
    assert " to {}, bias {}:".format(*strengths) in comparison[9]
    assert f" {main.OTHERS} images " in comparison[10] and " 359.25 degrees" in new_data[0]
    for (_, heading, *lines), methods, columns in (
        (comparison, main.METHODS, errors | costs),
        (new_data, main.NEW_METHODS, shares | costs),
    ):
        assert heading.split() == " ".join(columns).split()
        for line, (name, label) in zip(lines, methods.items()):
            cells = [main.cell(ROWS, name, metric) for metric in columns.values()]
            assert line.split() == [*label.split(), *cells]

    _, heading, *lines, last, _ = printed(main.print_low_rank, 4)
    assert re.findall(r"rank (\d+)", heading) == [str(rank) for rank in RANKS]
    for line, (word, names) in zip(lines, LOW_RANK.items(), strict=True):
        cells = [main.cell(ROWS, name, "accuracy_eighth") for name in names]
        assert (line.split()[0], line.split()[-5:]) == (word, cells)
    full, part = (main.cell(ROWS, f"digit/{x}", "digit_errors") for x in ("full", "full_rank1"))
    assert re.search(rf": {full} .* {part} ", last)

    _, about, heading, *lines, _ = printed(main.print_errors, 4)
    assert main.seeds_note(ROWS) in about
    assert heading.split()[2:12] == ["0", "1", "2", "3", "4*", "5", "6", "7", "8", "9"]
    for line, name in zip(lines, ("baseline", "lora"), strict=True):
        counts = [f"{count:.0f}" for count in main.mean(ROWS, f"digit/{name}", "errors")]
        right = f"{main.mean(ROWS, f'digit/{name}', 'accuracy'):.1%}"
        assert line.lower().split() == [name, *counts, right]


@pytest.fixture(scope="module")
def job() -> main.Job:
    """A main job of random images, models and answers, of which more than half are right."""
    torch.manual_seed(0)
    data = main.Data(*[main.Split(torch.randn(200, 784), torch.arange(200) % 10) for _ in "123"])
    test = data.test
    before, after = torch.randn(2, 200, 10) + 2 * torch.eye(10)[test.labels]
    start, lora = (main.attach_lora(main.MNISTClassifier(), 6, 6.0) for _ in range(2))
    models, images = (main.MNISTClassifier(), start, lora), data.train[data.train.labels == 4]
    return main.Job(main.Settings(), 4, 0, data, images, *models, before, after, [])


def strip(axes: Any, low: int = 0) -> tuple[torch.Tensor, list[Any]]:
    """The tiles of a strip, on the one scale of all, and the text above each."""
    (image,) = axes.images
    assert image.get_clim() == (low, 1)
    assert image.get_cmap()(0.0)[:3] == (1, 1, 1)  # `low` is white
    tiles = torch.from_numpy(image.get_array().data).unflatten(1, (-1, 30)).transpose(0, 1)
    assert [x.get_position()[0] for x in axes.texts] == list(range(15, 30 * len(tiles), 30))
    assert all(0 < x.get_position()[1] < 8 for x in axes.texts)
    return tiles[:, 8:, 1:29], axes.texts


def check_plane(axes: Any, x: str, y: str, dials: Any, methods: dict[str, str]) -> None:
    """Each dial is a curve and each method a point; a line leads from each to its label."""
    points = {name: (main.mean(ROWS, name, x), main.mean(ROWS, name, y)) for name in NAMES}
    expected = [*dials.items(), *[(label, [name]) for name, label in methods.items()]]
    assert len(axes.texts) == len(expected)
    for curve, (label, names) in zip(axes.get_lines(), expected, strict=True):
        color = curve.get_color()
        assert (color == "black") == (len(names) == 1)
        assert [tuple(place) for place in curve.get_xydata()] == [points[name] for name in names]
        alike = [text for text in axes.texts if text.get_color() == color]
        (text,) = [x for x in alike if x.get_text() == label or label in x.get_text() and names[1:]]
        assert text.xy in [points[name] for name in names[1:-1] or names]
    places = sorted((text.get_position()[1], text.xy[1]) for text in axes.texts)
    heights, attached = zip(*places, strict=True)
    assert min(b - a for a, b in itertools.pairwise(heights)) > 0.08  # a label's height
    assert list(attached) == sorted(attached)  # so that fewer of the lines cross
    assert {text.anncoords for text in axes.texts} == {"axes fraction"}
    assert all(0 <= part < 0.9 for text in axes.texts for part in text.xyann)


def test_the_trade_off_has_each_method_and_both_dials() -> None:
    (axes,) = main.draw_trade_off(ROWS, 4).axes
    check_plane(axes, "digit_errors", "accuracy", TRADE_OFF, main.METHODS)
    assert (axes.get_xlabel(), axes.get_title()) == ("errors on 4", "↖ better")
    assert axes.yaxis.get_major_formatter()(0.9743) == "97.4%"


def test_new_data_shows_what_both_models_say_and_both_dials(job: main.Job) -> None:
    images = job.data.test.images[8:16]
    answers = [model(images).argmax(1) for model in (job.baseline, job.start)]
    turned = main.Split(images, answers[0].where(torch.arange(8) < 3, answers[1]))
    own = {"turned": job.data.train, "turned_test": turned, "full": job.lora}
    tuned = main.Tuned(**vars(job), **own, new_lora=job.start, new_full=job.lora)
    *strips, plane = main.draw_new_data(ROWS, tuned).axes
    check_plane(plane, "accuracy_eighth", "accuracy_upright_eighth", NEW_DATA, main.NEW_METHODS)
    assert "turned" in plane.get_xlabel() and "upright" in plane.get_ylabel()
    assert plane.get_title("right") == "better ↗"
    for axes, says, name in zip(strips, answers, ("baseline", "LoRA"), strict=True):
        assert name in axes.get_title()
        tiles, words = strip(axes)
        assert torch.equal(tiles, main.pixels(turned))
        assert [word.get_text() for word in words] == [str(digit) for digit in says.tolist()]
        colors = [main.BLUE if right else main.ORANGE for right in says == turned.labels]
        assert [word.get_color() for word in words] == colors
        assert len(set(colors)) == 2


def test_low_rank_has_its_cuts_two_curves_and_the_ceiling(job: main.Job) -> None:
    top, bottom = main.draw_low_rank(ROWS, job).axes
    tiles, words = strip(top)
    image = main.pixels(job.images)[0]
    assert torch.equal(tiles, torch.stack([*[main.cut(image, rank) for rank in RANKS], image]))
    assert [word.get_text() for word in words[:5]] == [f"rank {rank}" for rank in RANKS]
    *curves, ceiling = bottom.get_lines()
    assert set(ceiling.get_ydata()) == {main.mean(ROWS, "new_data/full", "accuracy_eighth")}
    expected = []
    for curve, (word, names) in zip(curves, LOW_RANK.items(), strict=True):
        heights = [main.mean(ROWS, name, "accuracy_eighth") for name in names]
        assert curve.get_label().startswith(word)
        assert curve.get_xydata().tolist() == [list(place) for place in enumerate(heights)]
        expected += [(f"rank {x}", height, f"{height:.0%}") for x, height in zip(RANKS, heights)]
    assert [(*text.xy, text.get_text()) for text in bottom.texts] == expected
    assert bottom.texts[0].xyann[1] > 0 > bottom.texts[-1].xyann[1]
    legend = [text.get_text() for text in bottom.get_legend().get_texts()]
    assert legend == [*main.CURVES, "full fine-tuning"]
    assert bottom.yaxis.get_major_formatter()(0.5) == "50%"


def test_the_bars_are_the_errors_on_each_digit() -> None:
    (axes,) = main.draw_errors(ROWS, 4).axes
    assert (axes.patches[0].get_x(), axes.patches[0].get_width()) == (3.5, 1)
    for bars, (name, label, side) in zip(axes.containers, BARS, strict=True):
        assert bars.get_label() == label
        errors = main.mean(ROWS, name, "errors")
        assert [bar.get_height() for bar in bars] == errors
        places = [bar.get_x() + bar.get_width() / 2 - digit for digit, bar in enumerate(bars)]
        assert all(0 < side * place < 0.5 for place in places)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*"0123456789"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["baseline", "LoRA"]
    written = [text.get_text() for text in axes.texts]
    assert written == [f"{x:.0f}" for name, _, _ in BARS for x in main.mean(ROWS, name, "errors")]


def test_the_examples_are_the_first_of_their_kind(job: main.Job) -> None:
    labels, before, after = job.data.test.labels, job.before.argmax(1), job.after.argmax(1)
    was, now = before == labels, after == labels  # right
    kinds = (("wrong before, right now", ~was & now), ("right before, wrong now", was & ~now))
    for axes, (word, which) in zip(main.draw_examples(job).axes, kinds, strict=True):
        assert axes.get_title().startswith(f"{word}: the first of {int(which.sum())} ")
        tiles, words = strip(axes)
        first = which.nonzero().flatten()[:8]
        pixels = job.data.test.images[first] * main.STD + main.MEAN
        assert torch.equal(tiles, pixels.view(-1, 28, 28))
        shown = [re.findall(r"\d", word.get_text()) for word in words]
        assert shown == [[str(int(before[i])), str(int(after[i]))] for i in first]


def test_what_lora_learned_is_the_start_the_change_and_their_sum(job: main.Job) -> None:
    left, right = main.draw_learned(job).axes
    layers = [main.lora_layers(model)["linear1"] for model in (job.start, job.lora)]
    before, after = (layer.lora_A[:4].detach().view(4, 28, 28) for layer in layers)
    expected = torch.stack([before, after - before, after])
    tiles, words = strip(left, low=-1)
    assert [word.get_text()[0] for word in words] == ["r", "+", "="]  # random, plus, is
    tiles = tiles.view(3, 4, 30, 28)  # with a line above each and below
    assert torch.equal(tiles[:, :, 1:-1], expected / expected.abs().max())
    W, B, A = [area.get_paths()[0].get_extents() for area in right.collections]
    assert [[*area.size] for area in (W, B, A)] == [[784, 1000], [6, 1000], [784, 6]]
    assert B.x1 < W.x0 and A.y0 > W.y1 and right.get_aspect() == 1
    written = re.findall(r"\d+ × \d+", right.texts[0].get_text())
    assert written == ["1000 × 784", "1000 × 6", "6 × 784"]


def test_the_lines_of_the_main_job_are_of_its_lora(job: main.Job, capsys: Any) -> None:
    main.print_main_job(ROWS, job)
    first, _, _, added, *_ = capsys.readouterr().out.splitlines()
    assert first.endswith("linear1: frozen W 1000 x 784 + lora_B 1000 x 6 @ lora_A 6 x 784")
    assert "40,764 learned (+1.452%), 2,807,010 frozen" in added


def test_each_file_holds_its_picture_whatever_the_user_s_own_style(
    job: main.Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = main.draw(ROWS, job)
    own = {"text.usetex": True, "font.size": 30, "font.family": "no font", "savefig.format": "pdf"}
    with matplotlib.rc_context(own):
        assert main.draw(ROWS, job) == plain
        assert matplotlib.rcParams["font.size"] == 30

    def told(figure: Any, buffer: Any, **_: Any) -> None:
        buffer.write(f"{figure.get_suptitle()}; {figure.get_supxlabel()}".encode())

    monkeypatch.setattr(main.Figure, "savefig", told)
    title = {"learned.png": b"trace", "examples.png": b"spoils", "error_counts.png": b"errors"}
    assert plain.keys() == title.keys()
    for name, content in main.draw(ROWS, job).items():
        assert title[name] in content
        assert content.endswith(b"mean of 20 seeds" if name == "error_counts.png" else b"seed 0")
    with warnings.catch_warnings(action="error"):
        main.draw_examples(replace(job, after=job.before))  # nothing is put right or spoiled
