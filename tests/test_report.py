"""Chapter "Report": numbers, the table, and files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import main


def score(accuracy: float, errors: int) -> main.Score:
    return main.Score(accuracy, [errors] * 10, false_positives=errors)


def run(seed: int, lora: int = 4) -> main.Run:
    """A run whose control has 20, 10, 4 and 0 errors on each digit, at 97, 96, 94 and 80 %."""

    dial = {0.0: score(0.97, 20), 1.0: score(0.96, 10), 2.0: score(0.94, 4), 3.0: score(0.8, 0)}
    method = main.Method(2_807_010, 22_456_104, 11_230_437, score(0.92, lora))
    return main.Run(
        seed=seed,
        methods=dict.fromkeys([*main.LOOKS, "lora_off"], method),
        parameter_overhead=0.00242,
        lora_strength=0.5,
        logit_bias=2.5,
        control_at_lora_errors=main.read_off(dial, 9, lora),
        validation={"lora": {0.0: score(0.98, 7)}},
        trade_off={"lora": dial, "logit_bias": dial, "full": dial},
        update_energy={"linear1": [0.5, 1.0], "linear2": [0.6, 1.0], "linear3": [0.9, 1.0]},
    )


def test_number_is_a_value_or_mean_and_sample_deviation() -> None:
    assert main.number([40]) == "40"
    assert main.number([97.409], 2) == "97.41"
    assert main.number([1, 2, 3]) == "2.0±1.0"
    assert main.number([1, 2, 3], 2) == "2.00±1.00"


@pytest.mark.parametrize(
    ("count", "text"), [(4, "4 B"), (30_000, "30.0 kB"), (11_230_437, "11.2 MB")]
)
def test_size(count: int, text: str) -> None:
    assert main.size(count) == text


@pytest.mark.parametrize("runs", [[run(0, 1000)], [run(seed, 1000 + seed) for seed in range(20)]])
@pytest.mark.parametrize("digit", [0, 9])
def test_the_table_is_aligned_and_fits_80_columns(runs: list[main.Run], digit: int) -> None:
    lines = main.results_table(digit, runs).splitlines()
    assert {len(line) for line in lines} == {79}
    assert len(lines) == 17
    (marked,) = [line for line in lines if "===>" in line]
    assert marked.split()[:2] == ["====>", str(digit)]


@pytest.mark.parametrize(
    ("lora", "sentence"),
    [
        (4, "more than LoRA:\n94.0 % of all digits right, against 92.0 % at strength 1"),
        (3, "less than LoRA:\n80.0 % of all digits right, against 92.0 % at strength 1"),
        (30, "more than LoRA:\n97.0 % of all digits right, against 92.0 % at strength 1"),
    ],
)
def test_the_control_is_compared_at_loras_errors(lora: int, sentence: str) -> None:
    assert sentence in main.compare_with_control(9, [run(0, lora)])


def test_the_comparison_can_be_a_draw_or_impossible() -> None:
    draw = replace(run(0), control_at_lora_errors=0.92)
    assert "as much as LoRA" in main.compare_with_control(9, [draw])
    never = replace(run(1), control_at_lora_errors=None)
    assert "dial ends before" in main.compare_with_control(9, [run(0), never])
    assert main.read_off({}, 9, most=4) is None


@pytest.mark.parametrize("seeds", [1, 20])
def test_what_is_printed_fits_80_columns(seeds: int, capsys: pytest.CaptureFixture[str]) -> None:
    settings = main.Settings(seed=100, seeds=seeds)
    main.print_settings(settings, torch.device("cpu"))
    runs = [run(seed, 1000 + seed) for seed in range(seeds)]
    main.print_results(settings, runs, [0.5] * 28)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split() == ["4", "224", "50.00"] for line in lines)
    assert any("LoRA at strength 0.50" in line and "(chosen on" in line for line in lines)
    main.print_results(main.Settings(strength=0.5), runs, [0.5] * 28)
    assert "LoRA at strength 0.50" in (out := capsys.readouterr().out) and "(as given)" in out


def test_the_worst_digit_is_counted_with_ties(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(seed) for seed in range(3)]
    for one, errors in zip(runs, ({9: 7}, {9: 7, 2: 7}, {2: 8, 9: 7, 4: 8}), strict=True):
        found = main.Score(0.9, [errors.get(d, 0) for d in range(10)], 0)
        one.methods["baseline"] = replace(one.methods["baseline"], test=found)
    for number, line in (
        (1, "The baseline's worst digit: 9."),
        (3, "The baseline's worst digit (or tied) in 2 of 3 seeds: 2 9."),
    ):
        main.print_results(main.Settings(), runs[:number], [0.5] * 28)
        assert line in capsys.readouterr().out.splitlines()


def test_metrics_have_no_folder_and_both_sets_of_images() -> None:
    content = main.metrics(main.Settings(), torch.device("cpu"), [run(3)])
    assert "data_dir" not in content["config"]
    assert content["config"]["lora_lr"] == main.Settings().lora_lr
    (entry,) = content["runs"]
    assert entry["methods"]["lora"]["accuracy"] == 0.92
    point = {"bias": 1.0, "accuracy": 0.96, "target_errors": 10}
    assert entry["trade_off"]["logit_bias"][1] == point
    assert entry["validation"] == {
        "lora": [{"strength": 0.0, "accuracy": 0.98, "target_errors": 7}]
    }
    assert "strength" in entry["trade_off"]["full"][0]
    assert entry["update_energy_rank1"] == {"linear1": 0.5, "linear2": 0.6, "linear3": 0.9}


def test_mean_energy_is_taken_over_seeds() -> None:
    other = run(1)
    other.update_energy["linear1"] = [0.7, 1.0]
    assert main.mean_energy([run(0), other])["linear1"] == pytest.approx([0.6, 1.0])
