"""Every number in README.md, results/README.md and main.py's docstring is from results/."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from conftest import SCRIPT

import main

RESULTS = SCRIPT.parent / "results"
TEXT = (SCRIPT.parent / "README.md").read_text()
README = " ".join(TEXT.split())
NOTES = " ".join((RESULTS / "README.md").read_text().split())
ROWS = json.loads((RESULTS / "metrics.json").read_text())["rows"]
RATES = json.loads((RESULTS / "rates.json").read_text())
SEEDS = 20


def each(name: str, metric: str = "accuracy") -> list[Any]:
    """A metric for each seed; accuracies in percent."""
    found = main.values(ROWS, name, metric)
    assert len(found) == SEEDS
    return [100 * x for x in found] if metric.startswith("accuracy") else found


def mean(name: str, metric: str = "accuracy", decimals: int = 2) -> str:
    return f"{fmean(each(name, metric)):.{decimals}f}"


def spread(values: list[float], decimals: int, sign: str = "") -> str:
    text = f"{fmean(values):{sign}.{decimals}f} ± {stdev(values):.{decimals}f}"
    return text.replace("-", "−")


def pairs(one: str, other: str, metric: str = "accuracy") -> list[float]:
    return [a - b for a, b in zip(each(one, metric), each(other, metric))]


def test_the_table() -> None:
    for name, label in main.METHODS.items():
        false = each(name, "false_positives")
        cells = [
            spread(each(name, "digit_errors"), 1),
            spread(false, 0 if fmean(false) >= 100 else 1),
            spread(each(name), 2),
        ]
        trained = main.values(ROWS, name, "trainable_parameters")
        cells.append(f"{trained[0]:,}" if trained else "–")
        assert f"| {label} | {' | '.join(cells)} |" in README


def numbers(start: str) -> list[str]:
    """The decimal fractions, counts of seeds and shares by layer in the paragraph of that start."""
    (paragraph,) = re.findall(rf"\n\n([^\n]*{re.escape(start)}.*?)\n\n", TEXT, re.DOTALL)
    pattern = r"\d+ of 20|\d+, \d+ and \d+ %|[+−]?\d+\.\d+"
    return re.findall(pattern, " ".join(paragraph.split()))


def by_layer(shares: list[list[float]]) -> str:
    return "{:.0f}, {:.0f} and {:.0f} %".format(*(100 * fmean(x) for x in zip(*shares)))


def test_every_number_of_the_findings() -> None:
    errors = {name: mean(name, "digit_errors", 1) for name in main.METHODS}
    right = {name: mean(name) for name in main.METHODS}
    draws = [row for row in RATES if row["task"] == "draws" and "accuracy" in row]
    deviations = []
    for seed in range(5):
        deviations.append(stdev(100 * row["accuracy"] for row in draws if row["seed"] == seed))
    likeness = fmean(row["likeness"] for row in RATES if row["method"] == "lora_A")
    assert numbers("*A row of the first layer") == [f"{likeness:.2f}"]

    def worst(name: str) -> str:
        counts = main.values(ROWS, name, "errors")
        return f"{sum(row[9] == max(row) for row in counts)} of 20"

    assert numbers("The **baseline**") == [worst("digit/baseline"), worst("validation/baseline")]
    assert numbers("**LoRA learns the 9") == [
        *(errors["digit/baseline"], errors["digit/lora"]),
        *(right["digit/baseline"], right["digit/lora"]),
        *(f"{min(deviations):.1f}", f"{max(deviations):.1f}"),
    ]
    assert numbers("**The price is") == [errors["digit/lora_replay"], right["digit/lora_replay"]]
    gain = pairs("digit/logit_bias", "digit/lora_balanced")
    fewer = pairs("digit/lora_balanced", "digit/logit_bias", "digit_errors")
    assert numbers("**One number does") == [
        *spread(gain, 2, "+").split(" ± "),
        *spread(fewer, 1).split(" ± "),
        *(errors["digit/constant_part"], right["digit/constant_part"]),
    ]
    assert numbers("**Low rank is enough") == [
        *(errors["digit/full"], mean("digit/full_rank1", "digit_errors", 1)),
        by_layer([row["change_in_rank1"] for row in RATES if "change_in_rank1" in row]),
        by_layer([row["weights_in_rank1"] for row in RATES if "weights_in_rank1" in row]),
        *(mean(f"new_data/{x}_rank1", decimals=1) for x in ("full_part", "lora")),
    ]
    names = {x: f"new_data/{x}" for x in ("lora_rank8", "full", "full_matched")}
    kept = {x: mean(name, "accuracy_upright", 1) for x, name in names.items()}
    turned = {x: mean(name, decimals=1) for x, name in names.items()}
    lora, matched = names["lora_rank8"], names["full_matched"]
    ahead = sum(x > 0 for x in pairs(matched, lora, "accuracy_upright"))
    beside = "new_data/lora_rank8_at_0.8", "new_data/full_matched_at_1.0"
    assert numbers("**LoRA learns new data") == [
        *(turned["lora_rank8"], turned["full"], turned["full_matched"]),
        *(kept["full_matched"], kept["lora_rank8"], f"{ahead} of 20"),
        *(by_layer(each(name, "weight_change")) for name in (lora, matched)),
        "0.8",
        *spread(pairs(*beside), 1, "+").split(" ± "),
        *spread(pairs(*beside, "accuracy_upright"), 1, "+").split(" ± "),
    ]


def test_what_the_findings_say_without_a_number() -> None:
    """The bars that the project sets itself, on the published seeds."""
    before = fmean(each("digit/baseline", "digit_errors"))

    def left(method: str) -> float:
        return fmean(each(f"digit/{method}", "digit_errors")) / before

    def right(name: str, metric: str = "accuracy") -> float:
        return fmean(each(name, metric))

    assert right("digit/baseline") >= 97
    assert right("digit/lora") >= 90 and left("lora") <= 0.12
    assert right("digit/lora_balanced") >= right("digit/baseline") - 1.5
    assert abs(right("digit/lora_replay") - right("digit/baseline")) <= 0.3
    assert left("lora_replay") <= 0.75
    assert left("constant_part") <= 0.25
    assert right("digit/constant_part") >= right("digit/lora") + 1
    assert right("new_data/lora_rank8") >= 90
    assert abs(right("new_data/full_matched") - right("new_data/lora_rank8")) <= 1
    kept = [right(f"new_data/{x}", "accuracy_upright") for x in ("full_matched", "lora_rank8")]
    assert kept[0] >= kept[1] + 3
    assert right("new_data/lora_rank1") >= right("new_data/full_part_rank1") + 10
    assert right("new_data/baseline") <= 52 and right("new_data/biases") <= 53


def test_the_docstring_of_the_script() -> None:
    told = " ".join(main.__doc__.split())
    worst = sum(row[9] == max(row) for row in each("digit/baseline", "errors"))
    for part in (
        f"Means over {SEEDS} seeds on 10,000 test images",
        f"with {100 * each('digit/lora', 'parameter_overhead')[0]:.3f} % more parameters",
        (
            f"errors on 9 fall from {mean('digit/baseline', 'digit_errors', 1)} to "
            f"{mean('digit/lora', 'digit_errors', 1)}"
        ),
        f"accuracy falls from {mean('digit/baseline')} to {mean('digit/lora')} %",
        f"the worst digit of test images in {worst} of {SEEDS} seeds",
    ):
        assert part in told, part


def test_the_published_run_is_of_the_defaults() -> None:
    config = json.loads((RESULTS / "metrics.json").read_text())["config"]
    defaults = {key: value for key, value in asdict(main.Settings()).items() if "_dir" not in key}
    assert config == {**defaults, "seeds": SEEDS}


def test_seed_0_in_float32() -> None:
    other = json.loads((RESULTS / "float32.json").read_text())
    assert not other["environment"]["bfloat16"]
    for rows in (ROWS, other["rows"]):
        seed = [row for row in rows if row["seed"] == 0]
        numbers = []
        for name in ("digit/baseline", "digit/lora"):
            numbers.append(f"{100 * main.values(seed, name, 'accuracy')[0]:.2f}")
            numbers.append(f"{main.values(seed, name, 'digit_errors')[0]}")
        assert f"| {' | '.join(numbers)} |" in NOTES


def tried(name: str, metric: str, setting: str = "lr") -> dict[float, float]:
    """The mean of a metric on validation images over the five seeds, by the setting tried."""
    task, method = name.split("/")
    own = [row for row in RATES if (row["task"], row["method"]) == (task, method)]
    found = {}
    for value in {row.get(setting): None for row in own}:
        seeds = [row[metric] for row in own if row.get(setting) == value]
        assert len(seeds) == 5
        found[value] = fmean(seeds)
    return found


def test_the_rates_on_the_digit_were_chosen_by_their_rule() -> None:
    (baseline,) = tried("digit/baseline", "accuracy").values()
    for name, chosen, setting, points in (
        ("digit/lora", main.Settings().lora_lr, "lr", 0.06),
        ("digit/full", main.FULL_LR, "lr", 0.06),
        ("digit/lora_replay", main.OTHERS, "others", 0.003),
    ):
        right, errors = (tried(name, x, setting) for x in ("accuracy", "digit_errors"))
        allowed = [x for x in right if right[x] >= baseline - points]
        assert chosen == min(allowed, key=lambda x: errors[x])
        for value in right:
            bold = "**" * (value == chosen)
            cells = f"{bold}{value:g}{bold} | {100 * right[value]:.2f} | {errors[value]:.1f}"
            assert f"| {name.partition('/')[2]} | {cells} |" in NOTES


def test_the_rates_on_new_data_were_chosen_by_their_rule() -> None:
    matched = tried("new_data/full", "accuracy")
    goal = max(tried("new_data/lora_rank8", "accuracy").values())
    assert main.NEW_DATA_LR["full_matched"] == min(x for x in matched if matched[x] >= goal)
    for method, chosen in main.NEW_DATA_LR.items():
        if method == "full_matched":
            continue
        right = tried(f"new_data/{method}", "accuracy")
        assert chosen == max(right, key=lambda x: right[x])
        for value in right:
            bold = "**" * (value == chosen)
            assert f"| {method} | {bold}{value:g}{bold} | {100 * right[value]:.2f} |" in NOTES
