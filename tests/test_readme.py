"""The numbers in README.md, results/README.md and main.py's docstring are those in results/."""

import json
import re
from math import ceil
from statistics import fmean, stdev

import torch
from conftest import README, RESULTS, ROOT, some

import main

NOTES = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
RATES = json.loads((ROOT / "results" / "rates.json").read_text())
COLUMNS = {"accuracy, %": ("accuracy", 2), "missed 9s": ("missed", 1), "false 9s": ("false", 1)}


def told(method, metric="accuracy", decimals=2, task=None):
    """A mean over the 20 seeds and its deviation, as text."""
    rows = [x for x in RESULTS["rows"] if (x["method"], x.get("task")) == (method, task)]
    found = [row[metric] for row in rows]
    assert len(found) == 20
    return f"{fmean(found):,.{decimals}f}", f"{stdev(found):.{decimals}f}"


def test_each_cell_of_each_table():
    methods = []
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        heading, _, *lines = [line.split("|")[1:-1] for line in table.splitlines()]
        for method, *cells, stored in lines:
            for column, cell in zip(heading[1:], cells):
                what = COLUMNS.get(column) or ("accuracy", 1, column)
                assert cell == "±".join(told(method, *what))
            assert stored == told(method, "stored", 0, *what[2:])[0]
            methods.append(method)
    assert len(methods) == 5 + 6


def test_the_numbers_in_sentences():
    for method in ("full fine-tuning", "full fine-tuning on all digits"):
        rows = [row["shares"] for row in RESULTS["rows"] if row["method"] == method]
        first = [100 * fmean(x[f"linear{layer}"][0] for x in rows) for layer in (1, 2, 3)]
        assert "{:.0f}, {:.0f} and {:.0f} %".format(*first) in README
    for method, text in (("copy, cut to rank 4", "reads {} %"), ("LoRA, rank 4", "rank 4 {}.")):
        found = [x["accuracy"] for x in RESULTS["rows"] if x["method"] == method]
        assert text.format(round(fmean(found))) in README
    lost = [f"from {told('baseline', *x)[0]} to {told('LoRA', *x)[0]}" for x in COLUMNS.values()]
    assert all(text.replace("\n", " ") in main.__doc__.replace("\n", " ") for text in lost[:2])


def test_the_sizes(mnist):
    model = main.MNISTClassifier()
    whole = main.count_trained(model)
    small = main.count_trained(main.attach_lora(model, 1, 1))
    nines = int((mnist[0].labels == 9).sum())
    assert f"{whole:,} parameters ({4 * whole / 1e6:.0f} MB)" in README
    assert f"{small:,} ({4 * small / 1e3:.0f} kB)" in README
    assert f"{nines:,} images of 9 alone, in {ceil(nines / 128)} steps" in README
    assert f"{small:,} numbers, {small / whole:.3%}".replace("%", " %") in main.__doc__
    assert round(100 * 4 * small / whole) == 1  # at rank 4


def tried(method, metric, setting):
    """The mean of a metric on validation images over five seeds, by the setting tried."""
    found = {}
    for row in RATES:
        if row["method"] == method and setting in row:
            found.setdefault(row[setting], []).append(row[metric])
    return {value: fmean(rows) for value, rows in found.items()}


def test_the_constants_were_chosen_by_their_rules():
    (baseline,) = tried("baseline", "accuracy", "stored").values()
    for method, chosen, setting, points in (
        ("LoRA", main.PARSER.get_default("lora_lr"), "lr", 6),
        ("full fine-tuning", main.FULL_LR, "lr", 6),
        ("LoRA + other digits", main.OTHERS, "others", 0.3),
    ):
        good, bad = (tried(method, metric, setting) for metric in ("accuracy", "missed"))
        assert chosen == min((x for x in good if good[x] >= baseline - points), key=bad.get)
        for x in good:
            bold = "**" * (x == chosen)
            assert f"| {bold}{x:g}{bold} | {good[x]:.2f} | {bad[x]:.1f} |" in NOTES


def test_the_rates_are_tried_on_validation_images(mnist, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results")
    import choose_rates

    for name, tries in (("LORA", [1e-4, 0.02]), ("FULL", [6e-5]), ("OTHERS", [1, 3])):
        monkeypatch.setattr(choose_rates, name, tries)
    args, splits = main.PARSER.parse_args(["--lora-lr=0.02"]), some(mnist, 2000, 500)
    monkeypatch.setattr(main.PARSER, "parse_args", lambda _: args)
    job = main.main_job(args, 1, [splits[0], splits[1], splits[1]])
    rows = list(choose_rates.try_all(1, [*splits, None]))
    assert [row.get("lr", row.get("others")) for row in rows] == [None, 1e-4, 0.02, 6e-5, 1, 3]
    assert rows[-1]["errors"] != rows[-2]["errors"]
    assert rows[2]["errors"] == main.score(job, "LoRA", job.after, 0)["errors"]


def test_the_lesson(capsys):
    (lines,) = re.findall(r"```python\n(import torch\nfrom torch.+?)```", README, re.DOTALL)
    found = {}
    exec(lines, found)  # noqa: S102
    assert capsys.readouterr().out.split() == ["False", "True"]
    model = found["model"]
    for layer in (model[0], model[2]):
        lora, frozen = layer.parametrizations.weight[0], layer.parametrizations.weight.original
        assert lora.lora_B.any() and not frozen.requires_grad
        assert found["LoRAParametrization"](frozen, rank=2, alpha=5).scaling == 2.5
        lora.scaling = 3.0
        torch.testing.assert_close(layer.weight, frozen + 3 * lora.lora_B @ lora.lora_A)
