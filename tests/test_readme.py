"""Every number in README.md, results/README.md and main.py's docstring is one of results/."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from statistics import fmean
from typing import Any

import pytest
from conftest import SCRIPT

import main

RESULTS = SCRIPT.parent / "results"
README = " ".join((SCRIPT.parent / "README.md").read_text().replace("±", " ± ").split())
RATES = (RESULTS / "README.md").read_text()
RUNS = json.loads((RESULTS / "metrics.json").read_text())["runs"]


def text(values: list[float], decimals: int = 0, sign: str = "") -> str:
    return main.text(values, decimals, sign).replace("±", " ± ").replace("-", "−")


def each(name: str, key: str, task: str = "methods", factor: float = 1) -> list[float]:
    """A value of one method for each seed; the key 9 counts the errors on 9."""
    methods = [(run[task] if task == "methods" else run[task]["methods"])[name] for run in RUNS]
    found = [m["errors"][int(key)] if key.isdigit() else m[key] for m in methods]
    return [factor * value for value in found]


def accuracy(name: str, key: str = "accuracy", task: str = "methods") -> list[float]:
    return each(name, key, task, 100)


def row(label: str, cells: list[str]) -> str:
    return f"| {label} | {' | '.join(cells)} |"


@pytest.mark.parametrize(
    ("label", "key", "cell"),
    [
        ("errors on 9", "9", text),
        ("false 9s", "false_positives", text),
        ("accuracy, %", "accuracy", lambda values: text([100 * v for v in values], 2)),
        ("trained", "trainable_parameters", lambda values: f"{values[0]:,}"),
        ("optimiser", "optimizer_bytes", lambda values: main.size(values[0])),
        ("to ship", "file_bytes", lambda values: main.size(values[0])),
    ],
)
def test_the_table_on_nines(label: str, key: str, cell: Callable[[list[float]], str]) -> None:
    assert row(label, [cell(each(name, key)) for name in main.NAMES]) in README


@pytest.mark.parametrize(
    ("label", "key", "cell"),
    [
        ("accuracy, %", "accuracy", lambda values: text([100 * v for v in values], 1)),
        (
            "on upright digits, %",
            "accuracy_upright_on",
            lambda values: text([100 * v for v in values], 1),
        ),
        ("trained", "trainable_parameters", lambda values: f"{values[0]:,}"),
    ],
)
def test_the_table_on_new_data(label: str, key: str, cell: Callable[[list[float]], str]) -> None:
    assert row(label, [cell(each(name, key, "new_data")) for name in main.NEW_NAMES]) in README


def test_what_lora_reads_switched_off() -> None:
    upright = {name: text(accuracy(name, "accuracy_upright", "new_data"), 1) for name in main.LORAS}
    assert row("with LoRA switched off, %", [upright.get(x, "–") for x in main.NEW_NAMES]) in README


def test_the_findings() -> None:
    before, after = (fmean(each(name, "9")) for name in ("baseline", "lora"))
    right = {name: fmean(accuracy(name)) for name in main.NAMES}
    pairs = [(run["methods"]["logit_bias"], run["methods"]["lora_balanced"]) for run in RUNS]
    points = [100 * (control["accuracy"] - lora["accuracy"]) for control, lora in pairs]
    fewer = [control["errors"][9] - lora["errors"][9] for control, lora in pairs]
    share = text([100 * run["constant_share"] for run in RUNS])
    strength = text([run["lora_strength"] for run in RUNS], 2)
    constant = text([run["constant_logit"] for run in RUNS], 1, "+")
    turned = {n: fmean(accuracy(n, task="new_data")) for n in main.NEW_NAMES}
    upright = {n: fmean(accuracy(n, "accuracy_upright_on", "new_data")) for n in main.NEW_NAMES}
    trained = [each(name, "trainable_parameters", "new_data")[0] for name in ("full", "lora_rank8")]
    baselines = [run["methods"]["baseline"]["errors"] for run in RUNS]
    worst = sum(errors[9] == max(errors) for errors in baselines)
    for sentence in (
        f"with {100 * RUNS[0]['checks']['parameter_overhead']:.3f} % more parameters",
        f"removes {100 * (1 - after / before):.0f} % of the errors on 9",
        f"({text(each('baseline', '9'))} → {text(each('lora', '9'))})",
        f"rise from {text(each('baseline', 'false_positives'))} to "
        + text(each("lora", "false_positives")),
        f"falls from {right['baseline']:.2f} to {right['lora']:.2f} %",
        f"leaves {text(each('full', '9'))} errors on 9 and {right['full']:.2f} % right",
        f"({text(points, 2, '+')} points, compared seed by seed)",
        f"({text(fewer, 0, '+')}, fewer in {sum(x < 0 for x in fewer)} of {len(RUNS)} seeds)",
        f"{share} % of LoRA's change of the outputs",
        f"the same for every image, with {constant} on the 9",
        f"the baseline is right {turned['baseline']:.1f} % of the time",
        f"make that {turned['biases']:.1f} %",
        f"{turned['lora_rank1']:.1f} % at rank 1, {turned['lora_rank8']:.1f} % at rank 8",
        f"full fine-tuning has {turned['full']:.1f} %",
        f"and trains {trained[0] / trained[1]:.0f} times as many numbers",
        f"rank 8 reads {upright['lora_rank8']:.1f} %, full fine-tuning {upright['full']:.1f} %",
        f"{upright['full']:.1f} %, the baseline {right['baseline']:.1f} %",
        f"worst digit in {worst} of {len(RUNS)} seeds, or tied",
        f"validation images ({strength}, found by bisection)",
        f"({text([run['logit_bias'] for run in RUNS], 2)}, chosen by the same rule",
    ):
        assert sentence in README
    # what the sentences say without a number
    assert abs(right["lora"] - right["full"]) < 0.5
    assert abs(fmean(each("lora", "9")) - fmean(each("full", "9"))) < 1.5
    assert abs(fmean(points)) < 0.1
    assert fmean(fewer) < -2


def test_equal_errors_and_energy() -> None:
    found = []
    for dial in ("logit_bias", "lora"):
        curves = [(run["trade_off"][dial], run["methods"]["lora"]["errors"][9]) for run in RUNS]
        found.append(
            [100 * next(p["accuracy"] for p in c if p["target_errors"] <= n) for c, n in curves]
        )
    assert found[0] == [100 * run["control_at_lora_errors"] for run in RUNS]
    control, lora = (text(values, 1) for values in found)
    wins = sum(x > y for x, y in zip(*found, strict=True))
    assert f"keeps {control} % of all digits right, LoRA {lora} %; more in {wins} of 20" in README
    assert ", not in seed 0," in README and found[0][0] <= found[1][0]
    assert fmean(found[0]) > fmean(found[1])

    def energy(rank: int, new_data: bool) -> str:
        tasks = [run["new_data"] if new_data else run for run in RUNS]
        held = [[100 * x for x in task[f"update_energy_rank{rank}"].values()] for task in tasks]
        return "{:.0f}, {:.0f} and {:.0f} %".format(*map(fmean, zip(*held, strict=True)))

    assert f"On nines alone, rank 1 holds {energy(1, False)}; on new data " in README
    assert f"on new data {energy(1, True)}, and rank 8 {energy(8, True)}." in README


def test_seed_0_in_bfloat16_and_float32() -> None:
    other = json.loads((RESULTS / "float32" / "metrics.json").read_text())
    assert not other["environment"]["bfloat16"]
    reduced, plain = RUNS[0]["methods"], other["runs"][0]["methods"]
    numbers = [
        (100 * m["baseline"]["accuracy"], 100 * m["lora"]["accuracy"])
        + (m["baseline"]["errors"][9], m["lora"]["errors"][9])
        for m in (reduced, plain)
    ]
    sentence = "{:.2f} % before LoRA and {:.2f} % with it (errors on 9: {}, {})"
    both = [sentence.format(*values) for values in numbers]
    assert f"Seed 0 has {both[0]}; in float32 alone, {both[1]}." in README


def test_the_docstring_of_the_script() -> None:
    told = " ".join(main.__doc__.split())
    before, after = (fmean(each(name, "9")) for name in ("baseline", "lora"))
    assert f"Means over {len(RUNS)} seeds" in told
    assert f"of {before:.1f} errors on 9, LoRA leaves {after:.1f}" in told
    first, second = (fmean(accuracy(name)) for name in ("baseline", "lora"))
    assert f"falls from {first:.2f} to {second:.2f} %" in told


def test_the_published_run_is_of_the_defaults() -> None:
    config = json.loads((RESULTS / "metrics.json").read_text())["config"]
    defaults = {key: value for key, value in asdict(main.Settings()).items() if "_dir" not in key}
    assert config == {**defaults, "seeds": 20}


def test_the_default_rates_were_chosen_by_the_rules() -> None:
    nines: dict[str, dict[float, tuple[float, float]]] = {"lora_lr": {}, "full_lr": {}}
    turned: dict[str, dict[float, float]] = {}
    new_data = {
        "biases_lr": ("biases", "ten biases"),
        "rank1_lr": ("lora_rank1", "LoRA, rank 1"),
        "rank8_lr": ("lora_rank8", "LoRA, rank 8"),
        "turned_lr": ("full", "full fine-tuning"),
    }
    for path in sorted((RESULTS / "rates").glob("*/metrics.json")):
        content: dict[str, Any] = json.loads(path.read_text())
        config, runs = content["config"], content["runs"]
        assert (config["seed"], config["seeds"]) == (0, 5)
        baseline = 100 * fmean(run["validation"]["baseline"]["accuracy"] for run in runs)
        for name, by_rate in nines.items():
            points = [run["validation"][name.removesuffix("_lr")] for run in runs]
            found = fmean(p["accuracy"] for p in points), fmean(p["errors"][9] for p in points)
            by_rate[config[name]] = 100 * found[0], found[1]
        for name, (method, _) in new_data.items():
            methods = [run["new_data"]["methods"][method] for run in runs]
            found = 100 * fmean(method["validation_accuracy"] for method in methods)
            turned.setdefault(name, {})[config[name]] = found
    settings = asdict(main.Settings())
    chosen = []
    for (name, rates), label in zip(nines.items(), ("LoRA", "full fine-tuning"), strict=True):
        allowed = {rate: x for rate, x in rates.items() if x[0] >= baseline - 6}
        (best,) = [r for r, x in allowed.items() if x[1] == min(y for _, y in allowed.values())]
        assert settings[name] == best
        chosen.append(allowed[best][0])
        for rate, (right, errors) in rates.items():
            bold = "**" * (rate == best)
            assert f"| {label} | {bold}{rate:g}{bold} | {right:.2f} | {errors:.1f} |" in RATES
    assert abs(chosen[0] - chosen[1]) <= 0.5
    for name, rates in turned.items():
        best = max(rates, key=lambda rate: rates[rate])
        assert settings[name] == best
        for rate, right in rates.items():
            bold = "**" * (rate == best)
            assert f"| {new_data[name][1]} | {bold}{rate:g}{bold} | {right:.2f} |" in RATES
