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
CUT, BIAS = "full fine-tuning, cut to rank 1", "one biased logit"
ADAPTER, NEW, LAST = "adapter, rank 4", "new small network, as rank 4", "last layer alone"


def each(method, metric="accuracy", task=None):
    """A metric for each of the 20 seeds; accuracies in percent."""
    found = main.values(RESULTS["rows"], method, metric, task).tolist()
    assert len(found) == 20
    return found


def mean(method, metric="accuracy", task=None, decimals=1):
    return f"{fmean(each(method, metric, task)):.{decimals}f}"


def held(part):
    rows = [row for row in RESULTS["rows"] if row["method"] == part]
    layers = sorted({row["layer"] for row in rows})
    shares = [fmean(row["shares"][0] for row in rows if row["layer"] == x) for x in layers]
    return [f"{100 * share:.0f}" for share in shares]


def tried(method, metric, setting="lr", task=None):
    """The mean of a metric on validation images over five seeds, by the setting tried."""
    found = {}
    for row in RATES:
        if row["method"].startswith(method) and bool(row.get("task")) == bool(task):
            found.setdefault(row.get(setting), []).append(row[metric])
    assert all(len(rows) % 5 == 0 for rows in found.values())
    return {value: fmean(rows) for value, rows in found.items()}


def test_the_tables():
    for method in ("baseline", LORA, BIAS, MIXED, FULL):
        cells = []
        for metric, decimals in (("accuracy", 2), ("missed", 1), ("false", 1)):
            found = each(method, metric)
            cells.append(f"{fmean(found):.{decimals}f}±{stdev(found):.{decimals}f}")
        assert f"\n|{method}|{'|'.join(cells)}|\n" in README
    accuracies = [f"{mean(method, decimals=2)} %" for method in ("baseline", LORA)]
    assert f"|Accuracy|{'|'.join(accuracies)}|" in README
    errors = [mean(method, "missed") for method in ("baseline", LORA)]
    assert f"|Wrong predictions on 9|{'|'.join(errors)}|" in README


def test_every_number_of_the_findings():
    tasks = [
        mean(method, task=task)
        for task in ("rotated", "mirrored")
        for method in (ADAPTER, "copy of the network", NEW)
    ]
    lora, validated = tried(LORA, "accuracy"), tried("baseline", "accuracy")
    assert 100 * (validated[None] - lora[0.001]) == pytest.approx(1, abs=0.2)  # one point
    findings = {
        "LoRA learns the 9": [
            *("9", mean(LORA, "false", decimals=0), "9"),
            *(mean("baseline", "false", decimals=0), "9", "0.001", "0.0015"),
        ],
        "The price": ["9", mean(MIXED, "missed"), "9", "9", mean(BIAS, "missed")]
        + [mean(BIAS, decimals=2), "9"],
        "Low rank": [mean(FULL, "missed"), "1", mean(CUT, "missed"), "1"]
        + [*held("what fine-tuning changed"), *held("the weights")],
        "What LoRA is for": ["100", "4", "1", *tasks]
        + [mean(LAST, task="rotated"), mean(LAST, task="mirrored")]
        + [mean(x, task="shuffled") for x in (LAST, ADAPTER, NEW)],
    }
    for start, expected in findings.items():
        (paragraph,) = re.findall(rf"### {start}.*?\n\n(.*?)\n", README)
        assert re.findall(r"\d+(?:\.\d+)?", paragraph) == expected, start
    trained = {method: each(method, "trained")[0] for method in ("baseline", LORA)}
    assert {f"{x:,.0f}" for x in trained.values()} <= set(re.findall(r"[\d,]+\d", README))
    assert each(ADAPTER, "trained", "rotated")[0] / trained["baseline"] == pytest.approx(
        0.01, abs=1e-3
    )


def test_the_bars_that_the_project_sets_itself():
    before = fmean(each("baseline", "missed"))
    left = {x: fmean(each(x, "missed")) / before for x in (LORA, MIXED, BIAS)}
    points = {x: fmean(each(x)) for x in ("baseline", LORA, MIXED, BIAS)}
    assert points["baseline"] >= 97 and points[LORA] >= 90 and left[LORA] <= 0.12
    assert abs(points[BIAS] - points[LORA]) <= 1 and left[BIAS] <= left[LORA]
    assert abs(points[MIXED] - points["baseline"]) <= 0.3 and left[MIXED] <= 0.75
    for task in ("rotated", "mirrored"):
        adapter, copy, new = (
            fmean(each(x, task=task)) for x in (ADAPTER, "copy of the network", NEW)
        )
        assert abs(adapter - copy) <= 4 and adapter >= new + 2
    last, adapter, new = (fmean(each(x, task="shuffled")) for x in (LAST, ADAPTER, NEW))
    assert last + 5 <= adapter <= new


def test_the_docstring_of_the_script():
    told = " ".join(main.__doc__.split())
    share = 100 * each(LORA, "trained")[0] / each("baseline", "trained")[0]
    assert f"trains 6,794 numbers, {share:.3f} % of the network's" in told
    errors = [mean(method, "missed") for method in ("baseline", LORA)]
    assert f"Errors on 9 fall from {errors[0]} to {errors[1]}" in told
    accuracies = [mean(method, decimals=2) for method in ("baseline", LORA)]
    assert f"accuracy falls from {accuracies[0]} to {accuracies[1]} %" in told


def test_the_published_run_is_of_the_defaults():
    settings = vars(main.PARSER.parse_args(["--seeds=20"]))
    wanted = {name: value for name, value in settings.items() if not name.endswith("_dir")}
    assert RESULTS["config"] == wanted


def test_the_constants_were_chosen_by_their_rules():
    (baseline,) = tried("baseline", "accuracy").values()
    for method, chosen, setting, points in (
        (LORA, main.PARSER.get_default("lora_lr"), "lr", 0.06),
        (FULL, main.FULL_LR, "lr", 0.06),
        (MIXED, main.OTHERS, "others", 0.003),
    ):
        rows = [row for row in RATES if row["method"] == method]
        settings = sorted({row[setting] for row in rows})
        good, bad = {}, {}
        for x in settings:
            own = [row for row in rows if row[setting] == x]
            assert len(own) == 5
            good[x], bad[x] = (fmean(row[y] for row in own) for y in ("accuracy", "missed"))
            name = f"**{x:g}**" if x == chosen else f"{x:g}"
            assert f"| {method} | {name} | {100 * good[x]:.2f} | {bad[x]:.1f} |" in NOTES
        assert chosen == min((x for x in settings if good[x] >= baseline - points), key=bad.get)

    columns = {}
    for name, _, lr, steps in main.ways(main.MNISTClassifier()):
        if steps:
            columns[name.replace(",", "").split()[0]] = lr
    assert [*columns] == ["adapter", "new", "last", "copy"]
    best = {kind: tried(kind, "accuracy", task=True) for kind in columns}
    for kind, chosen in columns.items():
        assert chosen == max(best[kind], key=best[kind].get)
    for lr in best["copy"]:
        cells = []
        for kind in ("adapter", "last", "copy", "new"):
            text = f"{100 * best[kind][lr]:.2f}"
            cells.append(f"**{text}**" if lr == columns[kind] else text)
        assert f"| {lr:g} | {' | '.join(cells)} |" in NOTES
