"""The numbers in README.md, results/README.md and main.py's docstring are those in results/."""

import json
import re
from math import ceil
from statistics import fmean

import torch
from conftest import LESSON, README, ROOT, published, some, told

import main

NOTES = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
RATES = json.loads((ROOT / "results" / "rates.json").read_text())
WAYS = ["copy, cut to rank 4", "LoRA, rank 4", "last layer alone", "new small network"]
WAYS += ["copy of the network"]
COLUMNS = {"accuracy, %": ("accuracy", 2), "missed 9s": ("missed", 1), "false 9s": ("false", 1)}


def test_each_cell_of_each_table():
    scores, tasks = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    for table in (scores, tasks):
        heading, _, *lines = [line.split("|")[1:-1] for line in table.splitlines()]
        for method, *cells, stored in lines:
            for column, cell in zip(heading[1:], cells):
                what = COLUMNS.get(column) or ("accuracy", 1, column)
                assert cell == "±".join(told(method, *what))
            assert stored == told(method, "stored", 0, *what[2:])[0]


def test_the_numbers_in_sentences():
    for method in ("full fine-tuning", "full fine-tuning on all digits"):
        found = published(method, "shares")
        a, b, c = (100 * fmean(shares[layer][0] for shares in found) for layer in found[0])
        assert f"{a:.0f}, {b:.0f} and {c:.0f} %" in README
    cut, lora, last, new, copy = (
        fmean(fmean(published(method, task=task)) for task in main.TASKS) for method in WAYS
    )
    assert f"once trained, reads {cut:.0f} %; LoRA, trained at rank 4, {lora:.0f}." in README
    assert f"reads {lora:.0f} %, they {last:.0f} and {new:.0f}, the copy {copy:.0f}." in README
    for what in (("missed", 1), ("accuracy", 2)):
        lost = f"from {told('baseline', *what)[0]} to {told('LoRA', *what)[0]}"
        assert lost in main.__doc__.replace("\n", " ")


def test_the_sizes(mnist):
    model = main.MNISTClassifier()
    whole = main.count_trained(model)
    small = main.count_trained(main.attach_lora(model, 1, 1))
    nines = int((mnist[0].labels == 9).sum())
    assert f"{whole:,} parameters ({4 * whole / 1e6:.0f} MB)" in README
    assert f"{small:,} ({4 * small / 1e3:.0f} kB)" in README
    assert f"{nines:,} images of 9 alone, in {ceil(nines / 128)} steps" in README
    assert f"{small:,} numbers, {100 * small / whole:.3f} %" in main.__doc__
    assert round(100 * 4 * small / whole) == 1  # at rank 4


def tried(method, metric):
    """The mean of a metric on validation images over five seeds, by the setting tried."""
    found = {}
    for row in RATES:
        if row["method"] == method:
            found.setdefault(row.get("lr", row.get("others")), []).append(row[metric])
    return {setting: fmean(rows) for setting, rows in found.items()}


def test_the_constants_were_chosen_by_their_rules():
    for method, chosen, points in (
        ("LoRA", main.PARSER.get_default("lora_lr"), 6),
        ("full fine-tuning", main.FULL_LR, 6),
        ("LoRA + other digits", main.OTHERS, 0.3),
    ):
        right = tried(method, "accuracy")
        missed = tried(method, "missed")
        least = tried("baseline", "accuracy")[None] - points
        assert chosen == min((x for x in right if right[x] >= least), key=missed.get)
        for x in right:
            bold = "**" * (x == chosen)
            assert f"| {bold}{x:g}{bold} | {right[x]:.2f} | {missed[x]:.1f} |" in NOTES


def test_the_rates_are_tried_on_validation_images(mnist, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    import choose_rates

    args = main.PARSER.parse_args(["--lora-lr=0.02"])
    monkeypatch.setattr(main.PARSER, "parse_args", lambda _: args)
    monkeypatch.setattr(choose_rates, "LORA", [0.02])
    few, choose = some(mnist, 900, 300)
    job = main.main_job(args, 1, [few, choose, choose])
    _, lora, *_, one, _, nine = choose_rates.try_all(1, [few, choose, None])
    assert lora == main.score(job, "LoRA", job.after, 6794) | {"lr": 0.02}
    assert one["errors"] != nine["errors"]


def test_the_lesson(small, capsys):
    found = {}
    exec("".join(LESSON), found)  # noqa: S102
    before, _, off = capsys.readouterr().out.splitlines()
    assert before == off
    for layer in found["model"].children():
        assert layer.parametrizations.weight[0].lora_B.any()
    lora = found["LoRAParametrization"](layer.weight, rank=2, alpha=5)
    torch.nn.init.normal_(lora.lora_B)
    torch.testing.assert_close(lora(layer.weight), layer.weight + 2.5 * lora.lora_B @ lora.lora_A)
