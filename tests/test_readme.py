"""Every number in README.md, results/README.md and main.py's docstring is from results/."""

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
RATES = json.loads((RESULTS / "rates.json").read_text())
METRICS = json.loads((RESULTS / "metrics.json").read_text())
LORA, MATCHED = "new_data/lora_rank8", "new_data/full_matched"


def each(name: str, metric: str = "accuracy") -> list[Any]:
    """A metric for each of the 20 seeds; accuracies in percent."""
    found = main.values(METRICS["rows"], name, metric)
    assert len(found) == 20
    return [100 * x for x in found] if metric.startswith("accuracy") else found


def mean(name: str, metric: str = "accuracy", decimals: int = 2) -> str:
    return f"{fmean(each(name, metric)):.{decimals}f}"


def errors(method: str) -> str:
    return mean(f"digit/{method}", "digit_errors", 1)


def spread(values: list[float], decimals: int, sign: str = "") -> list[str]:
    texts = f"{fmean(values):{sign}.{decimals}f}", f"{stdev(values):.{decimals}f}"
    return [text.replace("-", "−") for text in texts]


def pairs(one: str, other: str, metric: str = "accuracy") -> list[float]:
    return [a - b for a, b in zip(each(one, metric), each(other, metric))]


def by_layer(shares: list[list[float]]) -> str:
    return "{:.0f}, {:.0f} and {:.0f} %".format(*(100 * fmean(x) for x in zip(*shares)))


def worst(name: str) -> str:
    return f"{sum(row[9] == max(row) for row in each(name, 'errors'))} of 20"


def tried(name: str, metric: str, setting: str = "lr") -> dict[float, float]:
    """The mean of a metric on validation images over five seeds, by the setting tried."""
    found: dict[float, list[float]] = {}
    for row in RATES:
        if f"{row['task']}/{row['method']}" == name:
            found.setdefault(row.get(setting), []).append(row[metric])
    assert {len(seeds) for seeds in found.values()} == {5}
    return {value: fmean(seeds) for value, seeds in found.items()}


def test_the_table() -> None:
    for name, label in main.METHODS.items():
        false = each(name, "false_positives")
        cells = [
            " ± ".join(spread(each(name, "digit_errors"), 1)),
            " ± ".join(spread(false, 0 if fmean(false) >= 100 else 1)),
            " ± ".join(spread(each(name), 2)),
        ]
        trained = main.values(METRICS["rows"], name, "trainable_parameters")
        cells.append(f"{trained[0]:,}" if trained else "–")
        assert f"| {label} | {' | '.join(cells)} |" in README


def test_every_number_of_the_findings() -> None:
    draws = [row for row in RATES if row["task"] == "draws" and "accuracy" in row]
    by_seed = [[100 * row["accuracy"] for row in draws if row["seed"] == i] for i in range(5)]
    deviations = [stdev(accuracies) for accuracies in by_seed]
    ahead = sum(x > 0 for x in pairs(MATCHED, LORA, "accuracy_upright"))
    findings = {
        "*A row of the first layer": [
            f"{fmean(row[x] for row in RATES if x in row):.2f}"
            for x in ("likeness", "likeness_all_digits")
        ],
        "The **baseline**": [worst("digit/baseline")],
        "**LoRA learns the 9": [
            *(errors("baseline"), errors("lora"), mean("digit/baseline"), mean("digit/lora")),
            *(f"{min(deviations):.1f}", f"{max(deviations):.1f}"),
        ],
        "**The price comes": [
            *(errors("lora_replay"), mean("digit/lora_replay")),
            *(errors("logit_bias_at_1"), mean("digit/logit_bias_at_1")),
        ],
        "**One number does": [
            *spread(pairs("digit/logit_bias", "digit/lora_balanced"), 2, "+"),
            *spread(pairs("digit/logit_bias", "digit/lora_balanced", "digit_errors"), 1, "+"),
            *(errors("logit_bias_at_5"), mean("digit/logit_bias_at_5")),
            *(errors("full"), mean("digit/full")),
            *(errors("constant_part"), mean("digit/constant_part")),
        ],
        "**Rank 1 is enough": [
            *(errors("full_rank1"), mean("digit/full_rank1")),
            by_layer([row["change_in_rank1"] for row in RATES if "change_in_rank1" in row]),
            by_layer([row["weights_in_rank1"] for row in RATES if "weights_in_rank1" in row]),
            *(mean(f"new_data/{x}_rank1", decimals=1) for x in ("full_part", "lora")),
        ],
        "**LoRA learns new data": [
            *(mean(LORA, decimals=1), mean(LORA, "accuracy_upright", 1)),
            *(mean("new_data/full", x, 1) for x in ("accuracy", "accuracy_upright")),
            *(mean(MATCHED, x, 1) for x in ("accuracy", "accuracy_upright")),
            f"{ahead} of 20",
            *(by_layer(each(name, "weight_change")) for name in (LORA, MATCHED)),
            "0.8",
            *spread(pairs(f"{LORA}_at_0.8", MATCHED, "accuracy_eighth"), 1, "+"),
            *spread(pairs(f"{LORA}_at_0.8", MATCHED, "accuracy_upright_eighth"), 1, "+"),
        ],
    }
    for start, expected in findings.items():
        (paragraph,) = re.findall(rf"\n\n([^\n]*{re.escape(start)}.*?)\n\n", TEXT, re.DOTALL)
        pattern = r"\d+ of 20|\d+, \d+ and \d+ %|[+−]?\d+\.\d+"
        assert re.findall(pattern, " ".join(paragraph.split())) == expected


def test_what_the_findings_say_without_a_number() -> None:
    """The bars that the project sets itself, on the published seeds."""
    before = fmean(each("digit/baseline", "digit_errors"))
    points = {name: fmean(each(name)) for name in (*main.METHODS, *main.NEW_METHODS)}
    assert worst("validation/baseline") == "0 of 20"  # "none", in README and docstring
    left = {name: fmean(each(name, "digit_errors")) / before for name in main.METHODS}
    assert points["digit/baseline"] >= 97
    assert points["digit/lora"] >= 90 and left["digit/lora"] <= 0.12
    assert points["digit/lora_balanced"] >= points["digit/baseline"] - 1.5
    assert abs(points["digit/lora_replay"] - points["digit/baseline"]) <= 0.3
    assert left["digit/lora_replay"] <= 0.75 and left["digit/constant_part"] <= 0.25
    assert points["digit/constant_part"] >= points["digit/lora"] + 1
    assert points[LORA] >= 90 and abs(points[MATCHED] - points[LORA]) <= 1
    assert fmean(pairs(MATCHED, LORA, "accuracy_upright")) >= 3
    assert fmean(pairs("new_data/lora_rank1", "new_data/full_part_rank1")) >= 10
    assert points["new_data/baseline"] <= 52 and points["new_data/biases"] <= 53
    for dial in (LORA, "new_data/full"):  # turned down, both learn less and forget less
        names = ["new_data/baseline", *[f"{dial}_at_{at}" for at in (0.4, 0.6, 0.8)], dial]
        for metric, less in (("accuracy_eighth", False), ("accuracy_upright_eighth", True)):
            found = [fmean(each(name, metric)) for name in names]
            assert found == sorted(found, reverse=less)


def test_the_docstring_of_the_script() -> None:
    told = " ".join(main.__doc__.split())
    for part in (
        "means over 20 seeds on 10,000 test images",
        f"It adds {100 * each('digit/lora', 'parameter_overhead')[0]:.3f} % parameters",
        f"Errors on 9 fall from {errors('baseline')} to {errors('lora')}",
        f"accuracy falls from {mean('digit/baseline')} to {mean('digit/lora')} %",
        f"the worst digit of test images in {worst('digit/baseline')} seeds",
    ):
        assert part in told, part


def test_the_published_runs_are_of_the_defaults_in_two_precisions() -> None:
    defaults = {key: value for key, value in asdict(main.Settings()).items() if "_dir" not in key}
    assert METRICS["config"] == {**defaults, "seeds": 20}
    other = json.loads((RESULTS / "float32.json").read_text())
    assert not other["environment"]["bfloat16"]
    for content in (METRICS, other):
        numbers = []
        for name in ("digit/baseline", "digit/lora"):
            seed = [row for row in content["rows"] if row["seed"] == 0]
            numbers.append(f"{100 * main.values(seed, name, 'accuracy')[0]:.2f}")
            numbers.append(f"{main.values(seed, name, 'digit_errors')[0]}")
        assert f"| {' | '.join(numbers)} |" in NOTES


def test_the_rates_were_chosen_by_their_rules() -> None:
    (baseline,) = tried("digit/baseline", "accuracy").values()
    for name, chosen, setting, points in (
        ("digit/lora", main.Settings().lora_lr, "lr", 0.06),
        ("digit/full", main.FULL_LR, "lr", 0.06),
        ("digit/lora_replay", main.OTHERS, "others", 0.003),
    ):
        good, bad = (tried(name, metric, setting) for metric in ("accuracy", "digit_errors"))
        allowed = [x for x in good if good[x] >= baseline - points]
        assert chosen == min(allowed, key=lambda x: bad[x])
        for value in good:
            cell = f"**{value:g}**" if value == chosen else f"{value:g}"
            row = f"{cell} | {100 * good[value]:.2f} | {bad[value]:.1f}"
            assert f"| {name.partition('/')[2]} | {row} |" in NOTES
    goal = max(tried(LORA, "accuracy").values())
    rates = dict(main.NEW_DATA_LR)
    ratios = [rate / rates["full"] for name, rate in rates.items() if "lora" in name]
    ratios.append(main.Settings().lora_lr / main.FULL_LR)
    assert f"Its rate is {min(ratios):.0f} to {max(ratios):.0f} times that" in README
    good = tried("new_data/full", "accuracy")
    assert rates.pop("full_matched") == min(x for x in good if good[x] >= goal)
    for method, chosen in rates.items():
        good = tried(f"new_data/{method}", "accuracy")
        assert chosen == max(good, key=lambda x: good[x])
        for value in good:
            cell = f"**{value:g}**" if value == chosen else f"{value:g}"
            assert f"| {method} | {cell} | {100 * good[value]:.2f} |" in NOTES
