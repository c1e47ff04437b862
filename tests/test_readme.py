"""The numbers in README.md, results/README.md and main.py's docstring are those in results/."""

import json
import re
from statistics import fmean, stdev

from conftest import README, RESULTS, ROOT

import main

NOTES = (ROOT / "results" / "README.md").read_text()
RATES = json.loads((ROOT / "results" / "rates.json").read_text())
LORA, FULL, MIXED = "LoRA", "full fine-tuning", "LoRA + other digits"
BOTH = "baseline", LORA
BIAS, COPY, CUT = "one biased logit", "copy of the network", "full fine-tuning, cut to rank 1"
ADAPTER, NEW, LAST = "adapter, rank 4", "new small network, as rank 4", "last layer alone"


def told(method, metric="accuracy", decimals=1, task=None, statistic=fmean):
    """The mean of a metric over the 20 seeds as text; accuracies in percent."""
    found = main.values(RESULTS["rows"], method, metric, task).tolist()
    assert len(found) == 20
    return f"{statistic(found):.{decimals}f}"


def test_each_decimal_number_in_its_place():
    def scores(method):
        return [told(method, "missed"), told(method, "accuracy", 2)]

    both = [told(x, "accuracy", 2) for x in BOTH]
    missed = [told(x, "missed") for x in BOTH]
    expected = ["2106.09685", "3.11", *both, *missed, "1.0", "0.5", "0.001", "0.0015"]
    expected += [*scores(MIXED), "0.2", *scores(BIAS), *scores(FULL), *scores(CUT)]
    for task in ("rotated", "mirrored"):
        expected += [told(way, task=task) for way in (ADAPTER, COPY, NEW)]
    expected.append(told("baseline", task="mirrored"))
    expected += [told(LAST, task=task) for task in ("rotated", "mirrored")]
    expected += [told(way, task="shuffled") for way in (LAST, ADAPTER, NEW)]
    for method in ("baseline", LORA, BIAS, MIXED, FULL):
        assert f"\n|{method}|{told(method, 'accuracy', 2)}±" in README
        for metric, decimals in (("accuracy", 2), ("missed", 1), ("false", 1)):
            expected += [told(method, metric, decimals, None, x) for x in (fmean, stdev)]
    assert re.findall(r"\d+\.\d+", README) == [*expected, "3.0", "3.0"]
    about = ["2106.09685", "0.242", *missed, *both]
    assert re.findall(r"\d+\.\d+", main.__doc__) == about


def test_the_whole_numbers():
    false = [told(x, "false", 0) for x in BOTH]
    assert f"{false[1]} other digits are called 9, where it was {false[0]}" in README
    for part in ("what fine-tuning changed", "the weights"):
        layers = main.values(RESULTS["rows"], part, "shares")[:, 0].view(20, 3).mean(0) * 100
        assert "{:.0f}, {:.0f} and {:.0f} %".format(*layers) in README


def tried(method, metric, setting):
    """The mean of a metric on validation images over five seeds, by the setting tried."""
    found = {}
    for row in RATES:
        if row["method"].startswith(method) and setting in row:
            found.setdefault(row[setting], []).append(row[metric])
    return {value: fmean(rows) for value, rows in found.items()}


def test_the_constants_were_chosen_by_their_rules():
    (baseline,) = tried("baseline", "accuracy", "trained").values()
    for method, chosen, setting, points in (
        ("LoRA", main.PARSER.get_default("lora_lr"), "lr", 0.06),
        ("full", main.FULL_LR, "lr", 0.06),
        ("LoRA +", main.OTHERS, "others", 0.003),
    ):
        good, bad = (tried(method, metric, setting) for metric in ("accuracy", "missed"))
        assert chosen == min((x for x in good if good[x] >= baseline - points), key=bad.get)
        for x in good:
            bold = "**" * (x == chosen)
            assert f"| {bold}{x:g}{bold} | {100 * good[x]:.2f} | {bad[x]:.1f} |" in NOTES
    for name, _, lr, steps in main.ways(main.MNISTClassifier()):
        if steps:
            good = tried(name.split()[0].strip(","), "accuracy", "lr")
            assert lr == max(good, key=good.get) and f"**{100 * good[lr]:.2f}**" in NOTES
            for x in good.values():
                assert f"{100 * x:.2f}" in NOTES
