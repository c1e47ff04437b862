"""Every number in README.md, results/README.md and main.py's docstring is from results/."""

import json
import re
from statistics import fmean, stdev

import pytest
from conftest import RESULTS, ROOT

import main

README = (ROOT / "README.md").read_text()
NOTES = (ROOT / "results" / "README.md").read_text()
RATES = json.loads((ROOT / "results" / "rates.json").read_text())
LORA, FULL, MIXED = "LoRA", "full fine-tuning", "LoRA + other digits"
BIAS, COPY = "one biased logit", "copy of the network"
CUT = "full fine-tuning, cut to rank 1"
ADAPTER, NEW, LAST = "adapter, rank 4", "new small network, as rank 4", "last layer alone"


def told(method, metric="accuracy", task=None, decimals=1, deviation=False):
    """The mean of a metric over the 20 seeds as text; accuracies in percent."""
    found = main.values(RESULTS["rows"], method, metric, task).tolist()
    assert len(found) == 20
    text = f"{fmean(found):.{decimals}f}"
    return f"{text}±{stdev(found):.{decimals}f}" if deviation else text


def test_the_tables():
    for method in ("baseline", LORA, BIAS, MIXED, FULL):
        metrics = ("accuracy", 2), ("missed", 1), ("false", 1)
        cells = [told(method, metric, None, x, deviation=True) for metric, x in metrics]
        assert f"\n|{method}|{'|'.join(cells)}|\n" in README
    both = ("baseline", LORA)
    assert f"|Accuracy|{'|'.join(told(x, decimals=2) + ' %' for x in both)}|" in README
    assert f"|Wrong predictions on 9|{'|'.join(told(x, 'missed') for x in both)}|" in README


def test_every_number_of_the_findings():
    def held(part):
        rows = [row for row in RESULTS["rows"] if row["method"] == part]
        layers = sorted({row["layer"] for row in rows})
        shares = [fmean(x["shares"][0] for x in rows if x["layer"] == layer) for layer in layers]
        return [f"{100 * share:.0f}" for share in shares]

    ways, missed = (ADAPTER, COPY, NEW), "missed"
    findings = {
        "LoRA learns the 9": [
            *("9", told(LORA, "false", decimals=0), "9", told("baseline", "false", decimals=0)),
            *("9", "0.001", "0.0015", "9"),
        ],
        "The price": [
            *("9", told(MIXED, missed), told(MIXED, decimals=2), "0.2", "9", "9"),
            *(told(BIAS, missed), told(BIAS, decimals=2), "9"),
        ],
        "Low rank": [
            *(told(FULL, missed), told(FULL, decimals=2), "1"),
            *(told(CUT, missed), told(CUT, decimals=2), "1"),
            *held("what fine-tuning changed"),
            *held("the weights"),
        ],
        "What LoRA is for": [
            *("100", "4", "1"),
            *[told(way, task=task) for task in ("rotated", "mirrored") for way in ways],
            told("baseline", task="mirrored"),
            *[told(LAST, task=task) for task in ("rotated", "mirrored")],
            *[told(way, task="shuffled") for way in (LAST, ADAPTER, NEW)],
        ],
    }
    for start, expected in findings.items():
        (paragraph,) = re.findall(rf"## {start}.*?\n\n(.*?)\n", README)
        assert re.findall(r"\d+(?:\.\d+)?", paragraph) == expected, start
    trained = [main.values(RESULTS["rows"], x, "trained")[0] for x in (LORA, "baseline")]
    assert f"{trained[0]:,.0f} numbers in place of {trained[1]:,.0f}" in README
    for part in (
        f"{trained[0]:,.0f} numbers, {100 * trained[0] / trained[1]:.3f} % of the network's",
        f"Errors on 9 fall from {told('baseline', missed)} to {told(LORA, missed)}",
        f"from {told('baseline', decimals=2)} to {told(LORA, decimals=2)} %",
    ):
        assert part in " ".join(main.__doc__.split())


def test_the_bars_that_the_project_sets_itself():
    def mean(method, metric="accuracy", task=None):
        return float(told(method, metric, task, 9))

    before = mean("baseline", "missed")
    assert mean("baseline") >= 97 and mean(LORA) >= 90 and mean(LORA, "missed") <= 0.12 * before
    assert abs(mean(BIAS) - mean(LORA)) <= 1
    assert mean(BIAS, "missed") <= mean(LORA, "missed") + 2
    assert abs(mean(MIXED) - mean("baseline")) <= 0.3 and mean(MIXED, "missed") <= 0.75 * before
    weak = "LoRA at strength 0.2"  # about as with other digits
    assert (
        abs(mean(weak) - mean(MIXED)) < 0.1
        and abs(mean(weak, "missed") - mean(MIXED, "missed")) < 1
    )
    assert abs(mean("baseline", task="rotated") - mean(NEW, task="rotated")) < 0.5
    for task in ("rotated", "mirrored"):
        adapter, copy, new = (mean(x, task=task) for x in (ADAPTER, COPY, NEW))
        assert abs(adapter - copy) <= 4 and adapter >= new + 2
    last, adapter, new = (mean(x, task="shuffled") for x in (LAST, ADAPTER, NEW))
    assert last + 5 <= adapter <= new


def test_the_published_run_is_of_the_defaults():
    settings = vars(main.PARSER.parse_args(["--seeds=20"]))
    assert settings.items() >= RESULTS["config"].items()
    assert settings.keys() - RESULTS["config"].keys() == {"data_dir", "output_dir"}


def tried(method, metric, setting):
    """The mean of a metric on validation images over five seeds, by the setting tried."""
    found = {}
    for row in RATES:
        if row["method"].startswith(method) and setting in row:
            found.setdefault(row[setting], []).append(row[metric])
    assert all(len(rows) % 5 == 0 for rows in found.values())
    return {value: fmean(rows) for value, rows in found.items()}


def test_the_constants_were_chosen_by_their_rules():
    baseline = fmean(row["accuracy"] for row in RATES if row["method"] == "baseline")
    rate = main.PARSER.get_default("lora_lr")
    for method, chosen, setting, points in (
        ("LoRA", rate, "lr", 0.06),
        ("full", main.FULL_LR, "lr", 0.06),
        ("LoRA +", main.OTHERS, "others", 0.003),
    ):
        good, bad = (tried(method, metric, setting) for metric in ("accuracy", "missed"))
        assert chosen == min((x for x in good if good[x] >= baseline - points), key=bad.get)
        for x in good:
            name = f"**{x:g}**" if x == chosen else f"{x:g}"
            assert f" | {name} | {100 * good[x]:.2f} | {bad[x]:.1f} |" in NOTES
    assert 100 * (baseline - tried("LoRA", "accuracy", "lr")[0.001]) == pytest.approx(1, abs=0.2)

    ways = main.ways(main.MNISTClassifier())
    chosen = {name.replace(",", "").split()[0]: lr for name, _, lr, steps in ways if steps}
    best = {kind: tried(kind, "accuracy", "lr") for kind in ("adapter", "last", "copy", "new")}
    assert chosen == {kind: max(best[kind], key=best[kind].get) for kind in best}
    for lr in best["copy"]:
        bold = {kind: "**" if lr == chosen[kind] else "" for kind in best}
        cells = [f"{bold[kind]}{100 * best[kind][lr]:.2f}{bold[kind]}" for kind in best]
        assert f"| {lr:g} | {' | '.join(cells)} |" in NOTES
