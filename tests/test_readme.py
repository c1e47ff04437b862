"""Every number in the README has to be one that the program wrote to results/."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import fmean
from typing import Any

import pytest
from conftest import SCRIPT

import main

README = (SCRIPT.parent / "README.md").read_text()
RESULTS = SCRIPT.parent / "results"
NAMES = ["baseline", "lora", "lora_balanced", "logit_bias", "full", "full_rank1"]


def runs(path: str = "metrics.json") -> list[dict[str, Any]]:
    return json.loads((RESULTS / path).read_text())["runs"]


def column(name: str, value: str) -> list[float]:
    methods = [run["methods"][name] for run in runs()]
    if value == "accuracy":
        return [100 * method["accuracy"] for method in methods]
    if value == "false_positives":
        return [method["false_positives"] for method in methods]
    return [method["errors"][int(value)] for method in methods]


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip("|\n ").split("|")]


@pytest.mark.parametrize(
    ("label", "value", "decimals"),
    [
        ("errors on 9", "9", 0),
        ("errors on 4", "4", 0),
        ("errors on 7", "7", 0),
        ("wrongly called 9", "false_positives", 0),
        ("accuracy, %", "accuracy", 2),
    ],
)
def test_the_table_is_that_of_the_published_run(label: str, value: str, decimals: int) -> None:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {label} |")]
    expected = [main.number(column(name, value), decimals).replace("±", " ± ") for name in NAMES]
    assert cells(line)[1:] == expected


def test_the_sentences_are_those_of_the_published_run() -> None:
    text = " ".join(README.split())
    left = fmean(column("lora", "9")) / fmean(column("baseline", "9"))
    cost = fmean(column("baseline", "accuracy")) - fmean(column("lora", "accuracy"))
    assert f"and {100 * (1 - left):.0f} % of the errors on 9 are gone" in text
    assert f"pay for it with {cost:.1f} points" in text
    baselines = [run["methods"]["baseline"]["errors"] for run in runs()]
    worst = sum(errors[9] > max(errors[:9]) for errors in baselines)
    ties = sum(errors[9] == max(errors[:9]) for errors in baselines)
    assert (
        f"9 is its worst digit in {worst} of {len(runs())} seeds, and as bad as another in {ties}"
        in text
    )
    assert f"on validation ({main.number([r['lora_strength'] for r in runs()], 2)})" in text
    assert f"a number ({main.number([r['logit_bias'] for r in runs()], 2)}, by" in text
    energy = [
        f"{100 * fmean(r['update_energy_rank1'][layer] for r in runs()):.0f} %"
        for layer in ("linear1", "linear2", "linear3")
    ]
    assert f"rank 1 alone holds {energy[0]}, {energy[1]} and {energy[2]} of the energy" in text


def test_the_rates_are_those_of_their_runs_and_the_defaults_were_chosen_by_the_rules() -> None:
    scores: dict[str, dict[float, tuple[float, float]]] = {"lora": {}, "full": {}}
    baseline = 0.0
    for folder in sorted((RESULTS / "rates").iterdir()):
        content = json.loads((folder / "metrics.json").read_text())
        config = content["config"]
        assert folder.name == f"{config['lora_lr']:g}-{config['full_lr']:g}"
        assert (config["seed"], config["seeds"]) == (0, 5)
        for name, by_rate in scores.items():
            validation = [run["methods"][name]["validation"] for run in content["runs"]]
            accuracy = 100 * fmean(v["accuracy"] for v in validation)
            errors = fmean(v["errors"][9] for v in validation)
            by_rate[config[f"{name}_lr"]] = (accuracy, errors)
        validation = [run["methods"]["baseline"]["validation"] for run in content["runs"]]
        baseline = 100 * fmean(v["accuracy"] for v in validation)
    for name, label in (("lora", "LoRA"), ("full", "full fine-tuning")):
        for rate, (accuracy, errors) in scores[name].items():
            assert f"| {label} | {rate:g} | {accuracy:.2f} | {errors:.1f} |" in README

    settings = asdict(main.Settings())
    lora = {rate: s for rate, s in scores["lora"].items() if s[0] >= baseline - 6}
    assert settings["lora_lr"] == min(lora, key=lambda rate: lora[rate][1])
    least = scores["lora"][settings["lora_lr"]][0]
    full = {rate: s for rate, s in scores["full"].items() if s[0] >= least}
    assert settings["full_lr"] == min(full, key=lambda rate: full[rate][1])


def test_the_published_run_is_of_the_defaults() -> None:
    config = json.loads((RESULTS / "metrics.json").read_text())["config"]
    defaults = {key: value for key, value in asdict(main.Settings()).items() if "_dir" not in key}
    assert config == {**defaults, "seeds": 20}
