"""Chapter "Report": numbers, no two the same, are read back from the table and the pictures."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from statistics import fmean as mean
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgba
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from torch import nn
from torchvision.transforms.functional import InterpolationMode, rotate

import main

SHOWN = {
    "baseline": ("baseline", "#999999"),
    "lora": ("LoRA", "#0072b2"),
    "lora_balanced": ("balanced LoRA", "#56b4e9"),
    "logit_bias": ("one biased logit", "#e69f00"),
    "full": ("full fine-tuning", "#d55e00"),
    "full_rank1": ("its rank-1 part", "#cc79a7"),
}
NEW = {
    "baseline": "baseline",
    "biases": "ten biases",
    "lora_rank1": "LoRA, rank 1",
    "lora_rank8": "LoRA, rank 8",
    "full": "full fine-tuning",
}
LAYERS = ("linear1", "linear2", "linear3")
ANGLE = 30.0


def make_run(seed: int, least: int, most: int) -> main.Run:
    """A run of which no two numbers are equal."""
    draw = random.Random(seed)
    counts = iter(draw.sample(range(least, most), 200))
    shares = iter(draw.sample(range(8000, 9900), 400))
    sizes = iter(draw.sample(range(100, 999), 100))
    small = iter(draw.sample(range(100, 900), 50))

    def share() -> float:
        return next(shares) / 10_000

    def score(errors: Sequence[int] | None = None) -> main.Score:
        drawn = list(errors or [next(counts) for _ in range(10)])
        return main.Score(share(), drawn, next(counts))

    def method(i: int, **extra: float) -> main.Method:
        units = 1, 1000, 1_000_000
        three = (next(sizes) * units[(i + j) % 3] for j in range(3))
        return main.Method(score(), *three, extra)

    def curve(positions: Sequence[float]) -> dict[float, main.Score]:
        # errors fall along it on each digit, at steps that are this curve's own
        step = [next(small) / 100 for _ in range(10)]
        scale = 40 / len(positions) * (most / 900)
        return {
            at: score([int((len(positions) - i) * scale * (x + 3)) for x in step])
            for i, at in enumerate(positions)
        }

    def energy() -> main.Energy:
        return {rank: {layer: share() for layer in LAYERS} for rank in main.RANKS}

    methods = {name: method(i) for i, name in enumerate((*SHOWN, "lora_off"))}
    # as in a real run, LoRA has the fewest errors and its dial ends there
    methods["lora"].test.errors[:] = draw.sample(range(1, 100), 10)
    return main.Run(
        seed=seed,
        methods=methods,
        new_data={
            name: method(
                i,
                validation_accuracy=share(),
                accuracy_upright=share(),
                accuracy_upright_on=share(),
            )
            for i, name in enumerate(NEW)
        },
        checks={},
        lora_strength=next(small) / 1000,
        logit_bias=next(small) / 100,
        constant_share=share(),
        constant_logit=next(small) / 100,
        validation={},
        trade_off={
            "lora": curve([*main.STRENGTHS[:-1], 0.35]) | {1.0: methods["lora"].test},
            "logit_bias": curve(main.BIASES),
            "full": curve([0.0, 1.0]),
        },
        energies=(energy(), energy()),
    )


ONE = [make_run(100, 10, 900)]
MANY = [make_run(seed, 10, 900) for seed in (3, 1, 2)]
TWENTY = [make_run(100 + seed, 930, 1136) for seed in range(20)]  # 1,135: all images of 1
HUNDREDS = [make_run(200 + seed, 100, 1000) for seed in range(20)]
every_length = pytest.mark.parametrize("runs", [ONE, MANY, TWENTY], ids=["1", "3", "20"])
every_digit = pytest.mark.parametrize("digit", [0, 4, 9])


def shown(values: Sequence[float], decimals: int = 0, sign: str = "") -> str:
    """What stands in a cell, written another way."""
    if len(values) == 1:
        return format(values[0], f"{sign}.{decimals}f")
    decimals = max(decimals, 1) if mean(values) < 100 else decimals
    return f"{format(mean(values), f'{sign}.{decimals}f')}±{stdev(values):.{decimals}f}"


def bytes_text(n: int) -> str:
    return f"{n} B" if n < 1000 else f"{n // 1000}.0 kB" if n < 10**6 else f"{n // 10**6}.0 MB"


def right(runs: Sequence[main.Run], name: str) -> list[float]:
    return [100 * run.methods[name].test.accuracy for run in runs]


def errors(runs: Sequence[main.Run], name: str, digit: int) -> list[int]:
    return [run.methods[name].test.errors[digit] for run in runs]


def new(runs: Sequence[main.Run], name: str) -> tuple[list[float], list[float]]:
    found = [run.new_data[name] for run in runs]
    return [100 * x.test.accuracy for x in found], [
        100 * x.extra["accuracy_upright_on"] for x in found
    ]


def off(runs: Sequence[main.Run], name: str) -> list[float]:
    return [100 * run.new_data[name].extra["accuracy_upright"] for run in runs]


# --- The terminal ---------------------------------------------------------------------------------


def test_text_is_a_value_or_mean_and_sample_deviation() -> None:
    assert main.text([40]) == "40"
    assert main.text([97.409], 2) == "97.41"
    assert main.text([2.5], 1, "+") == "+2.5"
    assert main.text([1, 2, 3]) == "2.0±1.0"
    assert main.text([1, 2, 3], 2) == "2.00±1.00"
    assert main.text([100, 200, 300]) == "200±100"
    assert main.text([-1, -2, -3], 0, "+") == "-2.0±1.0"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (29_973, "30.0 kB"),
        (1_000_000, "1.0 MB"),
        (11_230_437, "11.2 MB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert main.size(count) == text


@every_length
@every_digit
def test_each_cell_of_the_table(runs: list[main.Run], digit: int) -> None:
    lines = main.results_table(digit, runs).splitlines()
    assert {len(line) for line in lines} == {79}
    rows = [
        (x[:12].strip(), [x[13 + 11 * i : 24 + 11 * i].strip() for i in range(6)]) for x in lines
    ]
    (_, above), (label, below) = rows[:2]
    assert label == "errors on"
    headings = [f"{a} {b}".strip().replace("- ", "-") for a, b in zip(above, below, strict=True)]
    assert headings == [name for name, _ in SHOWN.values()]
    costs = [runs[0].methods[name] for name in SHOWN]
    assert rows[2:] == [
        *(
            (f"====> {d}" if d == digit else f"{d}", [shown(errors(runs, m, d)) for m in SHOWN])
            for d in range(10)
        ),
        (
            f"false {digit}s",
            [shown([run.methods[m].test.false_positives for run in runs]) for m in SHOWN],
        ),
        ("accuracy, %", [shown(right(runs, m), 2) for m in SHOWN]),
        ("trained", [f"{cost.trainable_parameters:,}" for cost in costs]),
        ("optimiser", [bytes_text(cost.optimizer_bytes) for cost in costs]),
        ("to ship", [bytes_text(cost.file_bytes) for cost in costs]),
    ]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(runs: list[main.Run], digit: int, points: float = 2.5) -> str:
        settings = main.Settings(
            digit=digit, seeds=len(runs), max_accuracy_drop=points, angle=ANGLE
        )
        main.print_results(settings, runs)
        return capsys.readouterr().out

    return call


@every_length
@every_digit
def test_each_number_in_the_sentences(
    runs: list[main.Run], digit: int, printed: Callable[..., str]
) -> None:
    out, n = printed(runs, digit), len(runs)
    assert f"\n{main.results_table(digit, runs)}\n" in out
    frozen, added = (runs[0].methods[m].trainable_parameters for m in ("baseline", "lora"))
    control, balanced = "logit_bias", "lora_balanced"
    pairs = zip(right(runs, control), right(runs, balanced), strict=True)
    points = shown([a - b for a, b in pairs], 2, "+")
    counts = zip(errors(runs, control, digit), errors(runs, balanced, digit), strict=True)
    fewer = [a - b for a, b in counts]
    baselines = [run.methods["baseline"].test.errors for run in runs]
    worst = sum(max(found) == found[digit] for found in baselines)
    facts = {  # what stands in the text, and what it should be: strings, wherever a line breaks
        r"the ([\d,]+) frozen values": [f"{frozen:,}"],
        r"LoRA is small: (\S+) new parameters, \+(\S+) %": [
            (f"{added:,}", f"{100 * added / frozen:.3f}")
        ],
        r"(before|with) LoRA: errors on (\d) (\S+), accuracy over all digits (\S+) %": [
            (when, str(digit), shown(errors(runs, name, digit)), shown(right(runs, name), 2))
            for when, name in (("before", "baseline"), ("with", "lora"))
        ],
        r"strength, (\S+) one biased": [shown([run.lora_strength for run in runs], 2)],
        r"bias, (\S+), added to its logit of (\d)": [
            (shown([run.logit_bias for run in runs], 2), str(digit))
        ],
        r"the most for up to (\S+) points": ["2.5"],
        r"(\d) is the baseline's worst digit, or tied, in (\d+) of (\d+) seeds": [
            (str(digit), str(worst), str(n))
        ],
        r"minus balanced LoRA, as chosen: accuracy (\S+) points, errors on (\d) ([^\s]+\d)": [
            (points, str(digit), shown(fewer, 0, "+"))
        ],
        r"\(fewer in (\d+) of (\d+) seeds\)": [(str(sum(x < 0 for x in fewer)), str(n))] * (n > 1),
        r"Why a bias works: (\S+) % of LoRA's change of logits is the same": [
            shown([100 * run.constant_share for run in runs])
        ],
        r"for every image, (\S+) on the (\d) above": [
            (shown([run.constant_logit for run in runs], 1, "+"), str(digit))
        ],
        r"digits turned by (\S+) degrees": ["30"],
        r"standard deviation of (\d+) seeds": [str(n)] * 2 * (n > 1),
        r"each of them for each of (\d+) seeds": [str(n)] * (n > 1),
    }
    told = " ".join(out.split())
    assert {pattern: re.findall(pattern, told) for pattern in facts} == facts
    for sentences in (main.compare_with_control(digit, runs), main.new_data_finding(runs)):
        assert f"\n{sentences.rstrip('.')}" in out


@every_length
def test_no_line_is_wider_than_80(runs: list[main.Run], printed: Callable[..., str]) -> None:
    assert not [line for line in printed(runs, 4).splitlines() if len(line) > 80]


@every_length
def test_each_cell_of_the_second_table(runs: list[main.Run], printed: Callable[..., str]) -> None:
    lines = printed(runs, 4).splitlines()
    (start,) = [i for i, line in enumerate(lines) if "turned, %" in line]
    rows = [
        (x[:19].strip(), *(x[19 + 12 * i : 31 + 12 * i].strip() for i in range(5)))
        for x in lines[start : start + 6]
    ]
    assert rows == [
        ("", "turned, %", "upright, %", "LoRA off, %", "trained", "to ship"),
        *(
            (
                NEW[name],
                *(shown(values, 1) for values in new(runs, name)),
                shown(off(runs, name), 1) if name.startswith("lora") else "",
                f"{runs[0].new_data[name].trainable_parameters:,}",
                bytes_text(runs[0].new_data[name].file_bytes),
            )
            for name in NEW
        ),
    ]


def at(errors_of_lora: int, accuracy: float = 0.92) -> main.Run:
    """The control has 20, 10, 4 and 0 errors on the 4, at 97, 96, 94 and 80 %."""

    def score(accuracy: float, errors: int) -> main.Score:
        return main.Score(accuracy, [3, 1, 3, 3, errors, 3, 3, 3, 3, 3], 3)

    points = ((0.97, 20), (0.96, 10), (0.94, 4), (0.8, 0))
    dial = {float(i): score(*point) for i, point in enumerate(points)}
    run = make_run(0, 10, 900)
    lora = {0.0: score(0.97, 20), 0.35: score(0.95, errors_of_lora + 1)}
    lora[1.0] = score(accuracy, errors_of_lora)
    run.methods["lora"] = main.Method(lora[1.0], 0, 0, 0)
    run.trade_off.update(logit_bias=dial, lora=lora)
    return run


@pytest.mark.parametrize(
    ("runs", "position", "verdict"),
    [
        ([at(4)], 0.94, "more digits right than LoRA: 94.0 % against 92.0 %"),
        ([at(3)], 0.8, "fewer digits right than LoRA: 80.0 % against 92.0 %"),
        ([at(19)], 0.96, "more digits right than LoRA: 96.0 % against 92.0 %"),
        ([at(4, 0.94)], 0.94, "as many digits right as LoRA: 94.0 % against 94.0 %"),
        (
            [at(4, 0.93), at(4, 0.95)],
            0.94,
            "as many digits right as LoRA: 94.0±0.0 % against 94.0±1.4 %",
        ),
        (
            [at(4, 0.93), at(10)],
            0.94,
            "more digits right than LoRA: 95.0±1.4 % against 92.5±0.7 % (in 2 of 2 seeds)",
        ),
        (
            [at(4), at(3)],
            0.94,
            "fewer digits right than LoRA: 87.0±9.9 % against 92.0±0.0 % (in 1 of 2 seeds)",
        ),
    ],
)
def test_the_control_is_compared_at_loras_errors(
    runs: list[main.Run], position: float, verdict: str
) -> None:
    assert main.at_lora_errors(4, runs[0], "logit_bias") == position
    sentence = "With as few errors on 4 as LoRA at strength 1, one biased logit keeps\n"
    assert main.compare_with_control(4, runs) == sentence + verdict


def test_the_control_may_never_get_there() -> None:
    runs = [at(4), at(-1), at(4)]
    assert main.at_lora_errors(4, runs[1], "logit_bias") is None
    sentence = (
        "In 1 of 3 seeds one biased logit never has\nas few errors on 4 as LoRA at strength 1"
    )
    assert main.compare_with_control(4, runs) == sentence


def test_the_worst_digit_is_counted_with_ties(printed: Callable[..., str]) -> None:
    runs = [make_run(seed, 10, 900) for seed in range(3)]
    for run, held in zip(runs, ({4: 7}, {4: 7, 2: 7}, {2: 8, 4: 7}), strict=True):
        run.methods["baseline"].test.errors[:] = [held.get(d, 0) for d in range(10)]
    for digit in (4, 2):
        worst = f"{digit} is the baseline's worst digit, or tied, in 2 of 3 seeds."
        assert worst in printed(runs, digit).splitlines()


@every_length
def test_the_finding_on_new_data(runs: list[main.Run]) -> None:
    (rank8, kept), (full, left) = new(runs, "lora_rank8"), new(runs, "full")
    found = re.fullmatch(
        r"Turned digits: LoRA of rank 8 reads (.+) %, full fine-tuning (.+) %\.\n"
        r"Upright: (.+) % and (.+) %; LoRA switched off is the baseline",
        main.new_data_finding(runs),
    )
    assert found and found.groups() == tuple(shown(x, 1) for x in (rank8, full, kept, left))


# --- The pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> main.Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(60, 784, generator=generator) * (torch.arange(784) % 28 > 5)
    return main.Split((pixels - main.MEAN) / main.STD, torch.arange(60) % 10)


def says(*digits: int) -> torch.Tensor:
    """Logits of a method that says these digits, again and again."""
    repeated = torch.tensor(digits).repeat(60)[:60]
    return nn.functional.one_hot(repeated, 10).float()


@pytest.fixture(scope="module")
def first() -> main.Artifacts:
    """The 4 is said of images 4, 14, ... by LoRA alone; each other method says something else."""
    before = list(range(60))
    for image, digit in {4: 9, 14: 7, 24: 8, 34: 9, 54: 1, 8: 4, 21: 3}.items():
        before[image] = digit
    after = list(before)
    for image, digit in {4: 4, 14: 4, 34: 4, 54: 2, 8: 8, 21: 4, 7: 4, 19: 4, 30: 4, 5: 6}.items():
        after[image] = digit
    logits = {
        "lora": {0.0: before, 0.5: [4] * 60, 1.0: after},
        "logit_bias": {0.0: [4] * 60, 1.0: [4] * 60},
        "full": {0.0: [0] * 60, 1.0: [4] * 60},
    }
    return main.Artifacts(
        nn.Identity(),
        {},
        {
            name: {x: says(*(digit % 10 for digit in digits)) for x, digits in dial.items()}
            for name, dial in logits.items()
        },
        {name: says(*range(i, 10), *range(i)) for i, name in enumerate(NEW)},
    )


def bars_of(axes: Any) -> list[dict[str, Any]]:
    """Of each group of bars: label, colour, heights, deviations, and the numbers on the bars."""
    groups = [x for x in axes.containers if isinstance(x, BarContainer)]
    found, written = [], [text.get_text() for text in axes.texts]
    for i, group in enumerate(groups):
        n = len(group.patches)
        (segments,) = (lines.get_segments() for lines in group.errorbar.lines[2])
        centres = [bar.get_x() + bar.get_width() / 2 for bar in group.patches]
        offset = (i - (len(groups) - 1) / 2) * 0.84 / len(groups)
        assert centres == pytest.approx([tick + offset for tick in range(n)])
        found.append(
            {
                "label": group.get_label(),
                "color": {to_hex(bar.get_facecolor()) for bar in group.patches},
                "heights": pytest.approx([bar.get_height() for bar in group.patches]),
                "deviations": pytest.approx([(b[1] - a[1]) / 2 for a, b in segments], abs=1e-9),
                "written": written[n * i : n * (i + 1)],
            }
        )
    assert len(written) == sum(len(group.patches) for group in groups)
    return found


def bars(label: str, color: str, columns: Sequence[Sequence[float]], decimals: int) -> dict:
    means = [mean(values) for values in columns]
    return {
        "label": label,
        "color": {color},
        "heights": means,
        "deviations": [stdev(values) if len(values) > 1 else 0.0 for values in columns],
        "written": [f"{x:.{decimals}f}" for x in means],
    }


def ticks(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


@every_length
@every_digit
def test_the_picture_of_errors(runs: list[main.Run], digit: int) -> None:
    figure, n = main.draw_errors(digit, runs), len(runs)
    before, after = (mean(errors(runs, name, digit)) for name in ("baseline", "lora"))
    cost = mean(right(runs, "baseline")) - mean(right(runs, "lora"))
    assert figure.get_suptitle() == (
        f"LoRA leaves {after:.0f} of {before:.0f} errors on {digit}, at a cost of {cost:.1f} points"
        " of overall accuracy" + f" (mean ± standard deviation of {n} seeds)" * (n > 1)
    )
    panels = [["baseline", "lora"], *([name] for name in list(SHOWN)[2:])]
    assert len(figure.axes) == len(panels)
    for axes, names in zip(figure.axes, panels, strict=True):
        assert bars_of(axes) == [
            bars(*SHOWN[name], [errors(runs, name, d) for d in range(10)], 0) for name in names
        ]
        rights = [f"{SHOWN[name][0]}: {shown(right(runs, name), 1)} % right" for name in names]
        assert axes.get_title() == ", ".join(rights)
        assert ticks(axes) == [str(d) for d in range(10)]
        (span,) = [x for x in axes.patches if to_hex(x.get_facecolor()) == "#fff3b0"]
        assert (span.get_x(), span.get_width()) == (digit - 0.5, 1)
        assert axes.get_ylim() == figure.axes[0].get_ylim()
    assert legend(figure.axes[0]) == ["baseline", "LoRA"]


@every_length
@every_digit
def test_the_trade_off(runs: list[main.Run], digit: int) -> None:
    figure = main.draw_trade_off(digit, runs)
    assert figure.get_suptitle() == main.compare_with_control(digit, runs)
    (axes,) = figure.axes
    lora, control, *points = axes.get_lines()
    for line, name, positions, style in (
        (lora, "lora", (0, 0.2, 0.5, 0.8, 0.9, 1), ("s", "-")),
        (control, "logit_bias", [i / 4 for i in range(33)], ("^", "--")),
    ):
        scores = [[run.trade_off[name][position] for run in runs] for position in positions]
        curve = [
            (mean(s.errors[digit] for s in each), 100 * mean(s.accuracy for s in each))
            for each in scores
        ]
        assert line.get_xydata().ravel() == pytest.approx(np.array(curve).ravel())
        assert to_hex(line.get_color()) == SHOWN[name][1]
        assert (line.get_marker(), line.get_linestyle()) == style
        if name == "lora":
            noted = {"LoRA": curve[3], "strength 0.5": curve[2], "strength 1": curve[5]}
        else:
            noted["control"] = curve[8]
    written = {text.get_text(): text.xy for text in axes.texts}
    assert written == {words: pytest.approx(point) for words, point in noted.items()}
    labels = ["LoRA, at strengths 0.2 to 1", "one biased logit, the control"]
    chosen = ", as chosen"
    markers = {
        "baseline": ("o", ""),
        "lora": ("s", ""),
        "lora_balanced": ("D", chosen),
        "logit_bias": ("^", chosen),
        "full": ("v", ""),
    }
    assert len(points) == len(markers)
    for point, (name, (marker, how)) in zip(points, markers.items(), strict=True):
        x, y = errors(runs, name, digit), right(runs, name)
        assert point.get_xydata().tolist() == [pytest.approx([mean(x), mean(y)])]
        assert point.get_marker() == marker
        assert to_rgba(point.get_markerfacecolor())[3] == 0  # hollow
        assert point.get_markeredgecolor() == "black"
        labels.append(f"{SHOWN[name][0]}{how}: errors {shown(x)}, accuracy {shown(y, 1)} %")
    assert legend(axes) == labels
    assert axes.get_ylim()[0] == pytest.approx(min(mean(right(runs, x)) for x in markers) - 0.5)
    assert axes.get_xlabel() == f"errors on {digit}, test images (fewer is better)"
    assert axes.get_ylabel() == "accuracy over all digits, % (more is better)"


@every_length
@every_digit
def test_the_picture_of_low_rank(runs: list[main.Run], digit: int, held_out: main.Split) -> None:
    figure = main.draw_low_rank(digit, runs, held_out.images[digit])
    title = figure.get_suptitle()
    nines, turned = (
        [100 * mean(run.energies[task][1][layer] for run in runs) for layer in LAYERS]
        for task in (0, 1)
    )
    assert title == (
        f"An image of {digit} at four ranks. Rank 1 holds at least {min(nines):.0f} % of "
        f"each layer's change\non {digit} alone, and at most {max(turned):.0f} % of it on new data"
        + f" (mean ± standard deviation of {len(runs)} seeds)"
        * (len(runs) > 1)
    )
    pixels = held_out.images[digit].view(28, 28).double().numpy() * main.STD + main.MEAN
    U, S, V = np.linalg.svd(pixels)
    ranks = (1, 2, 4, 8)
    for rank, axes in zip(ranks, figure.axes, strict=False):
        (image,) = axes.images
        part = U[:, :rank] * S[:rank] @ V[:rank]
        assert np.allclose(image.get_array(), part, atol=1e-5)
        assert (image.get_clim(), image.get_cmap().name) == ((0, 1), "gray_r")
        share = 100 * (S[:rank] ** 2).sum() / (S**2).sum()
        numbers = re.findall(r"\d+", axes.get_title())
        assert numbers == [f"{rank}", f"{rank * 56}", f"{share:.0f}"]
    assert len(figure.axes) == 7
    for layer, axes in zip(LAYERS, figure.axes[4:], strict=True):
        assert bars_of(axes) == [
            bars(
                label,
                color,
                [[100 * run.energies[task][rank][layer] for run in runs] for rank in ranks],
                0,
            )
            for task, label, color in (
                (0, f"on {digit} alone", "#0072b2"),
                (1, "on new data", "#e69f00"),
            )
        ]
        assert axes.get_title() == f"{layer}: energy of the change, %"
        assert ticks(axes) == [f"rank {rank}" for rank in ranks]
    assert legend(figure.axes[4]) == [f"on {digit} alone", "on new data"]


def assert_strip(axes: Any, images: Sequence[torch.Tensor], words: list[str]) -> None:
    """The images side by side, then white, and a word in the middle above each."""
    (drawn,) = axes.images
    assert (drawn.get_clim(), drawn.get_cmap().name) == ((0, 1), "gray_r")
    tiles = np.split(drawn.get_array().data, 8, axis=1)
    black = torch.full((784,), -main.MEAN / main.STD)
    for tile, image in itertools.zip_longest(tiles, images, fillvalue=black):
        pixels = (image * main.STD + main.MEAN).view(28, 28).numpy()
        assert np.allclose(tile, pixels, atol=1e-5)
    assert ticks(axes) == words
    assert axes.get_xticks().tolist() == [28 * i + 13.5 for i in range(len(words))]


def test_the_examples(held_out: main.Split, first: main.Artifacts) -> None:
    figure, images = main.draw_examples(4, MANY, held_out, first), held_out.images
    title = "Images of 4 LoRA puts right: 3; right ones it now calls 4: 3 (seed 3)"
    assert figure.get_suptitle() == title
    above, below = figure.axes
    assert_strip(above, [images[i] for i in (4, 14, 34)], ["9", "7", "9"])
    assert_strip(below, [images[i] for i in (7, 19, 30)], ["7", "9", "0"])
    assert "baseline said" in above.get_title() and "now called 4" in below.get_title()


def test_of_many_examples_the_first_eight_are_shown(held_out: main.Split) -> None:
    logits = {"lora": {0.0: says(*range(10)), 1.0: says(4)}}
    first = main.Artifacts(nn.Identity(), {}, logits, {})
    figure = main.draw_examples(4, ONE, held_out, first)
    title = "Images of 4 LoRA puts right: 0; right ones it now calls 4: 54 (seed 100)"
    assert figure.get_suptitle() == title
    assert_strip(figure.axes[0], [], [])
    wanted = [0, 1, 2, 3, 5, 6, 7, 8]
    assert_strip(figure.axes[1], [held_out.images[i] for i in wanted], [str(i) for i in wanted])


@every_length
def test_the_picture_of_new_data(
    runs: list[main.Run], held_out: main.Split, first: main.Artifacts
) -> None:
    figure, n = main.draw_new_data(ANGLE, runs, held_out, first), len(runs)
    assert figure.get_suptitle() == main.new_data_finding(runs)
    upright, turned, panel = figure.axes
    assert panel.get_xlabel() == f"mean ± standard deviation of {n} seeds" * (n > 1)
    images = held_out.images[:8]
    assert upright.get_title() == "the first eight test images"
    assert_strip(upright, list(images), [str(i) for i in range(8)])
    assert turned.get_title() == (
        f"turned by 30°: what the baseline / LoRA of rank 8 say (seed {runs[0].seed})"
    )
    pixels = (images * main.STD + main.MEAN).view(8, 1, 28, 28)
    pixels = rotate(pixels, ANGLE, InterpolationMode.BILINEAR).view(8, 784)
    words = [f"{i} / {(i + 3) % 10}" for i in range(8)]
    assert_strip(turned, list((pixels - main.MEAN) / main.STD), words)
    columns = list(zip(*(new(runs, name) for name in NEW), strict=True))
    groups = [("turned digits", "#0072b2"), ("upright digits", "#999999")]
    assert bars_of(panel) == [
        bars(*group, values, 1) for group, values in zip(groups, columns, strict=True)
    ]
    assert ticks(panel) == list(NEW.values())
    assert panel.get_ylabel() == "test images right, %"
    assert legend(panel) == [label for label, _ in groups]


@pytest.mark.parametrize("runs", [ONE, HUNDREDS], ids=["1", "20"])
@pytest.mark.parametrize("digit", [0, 9])
def test_nothing_is_cut_off_and_no_title_lies_on_another(
    runs: list[main.Run], digit: int, held_out: main.Split, first: main.Artifacts
) -> None:
    figures: list[Figure] = [
        main.draw_errors(digit, runs),
        main.draw_trade_off(digit, runs),
        main.draw_low_rank(digit, runs, held_out.images[digit]),
        main.draw_examples(digit, runs, held_out, first),
        main.draw_new_data(ANGLE, runs, held_out, first),
    ]
    for figure in figures:
        figure.dpi = 120  # as it is saved
        figure.draw_without_rendering()
        all_of_it, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert 0 <= all_of_it.x0 and all_of_it.x1 <= width, figure.get_suptitle()
        assert 0 <= all_of_it.y0 and all_of_it.y1 <= height, figure.get_suptitle()
        titles = [figure._suptitle, *(axes.title for axes in figure.axes)]
        boxes = [(x.get_text(), x.get_window_extent()) for x in titles if x.get_text()]
        for (one, box), (other, another) in itertools.combinations(boxes, 2):
            assert not box.overlaps(another), (one, other)
        numbers = [
            t for axes in figure.axes for t in axes.texts if re.fullmatch(r"\d+", t.get_text())
        ]
        assert all(t.get_window_extent().y1 <= t.axes.bbox.y1 for t in numbers)
