"""One whole run on the real data: the published numbers, the files, PEFT, and the README."""

import re
import shlex

import pytest
import torch
from conftest import RESULTS, ROOT
from peft import PeftModel
from test_experiment import fit, network

import main

README = (ROOT / "README.md").read_text()
PICTURES = {f"{x}.png" for x in ("error_counts", "examples", "learned")}
PICTURES |= {f"{x}.png" for x in ("trade_off", "low_rank", "tasks")}
ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.bin"}


def errors(rows, method):
    (row,) = [row for row in rows if row["method"] == method and "task" not in row]
    return row["errors"]


def test_the_published_rows_again(whole_run, mnist):
    """Exactly, on a processor that rounds the baseline as the publishing one did."""
    torch.manual_seed(0)
    state = dict(main.MNISTClassifier().state_dict())
    (images, labels), _, test = mnist
    fit(network(state), state.values(), images, labels, 2e-3, 1, 256, 0)
    said = network(state)(test.images).argmax(1)
    baseline = [int(((test.labels == x) & (said != x)).sum()) for x in range(10)]
    rows = whole_run.metrics["rows"]
    assert errors(rows, "baseline") == baseline
    published = [row for row in RESULTS["rows"] if row["seed"] == 0]
    if errors(published, "baseline") == baseline:
        assert rows == published
    assert len(rows) == len(published)
    for row, other in zip(rows, published):
        names = ("question", "method", "task", "layer", "trained")
        assert all(row.get(name) == other.get(name) for name in names)
        if "accuracy" in row:
            allowed = 0.05 if "task" in row else 0.015
            assert row["accuracy"] == pytest.approx(other["accuracy"], abs=allowed), row
        if "missed" in row:
            assert row["missed"] == pytest.approx(other["missed"], abs=12)
            assert row["missed"] == row["errors"][9]
            assert row["accuracy"] == (10_000 - sum(row["errors"])) / 10_000


def test_the_log_and_the_files(whole_run):
    assert whole_run.err == "" and "\r" not in whole_run.out  # no bars, no warnings
    lines = whole_run.out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80
    files = {
        path.relative_to(whole_run.outputs).as_posix() for path in whole_run.outputs.rglob("*.*")
    }
    assert files == PICTURES | ADAPTER | {"metrics.json", "baseline.pt"}
    for name in PICTURES:
        assert (whole_run.outputs / name).read_bytes().startswith(b"\x89PNG")


def test_peft_makes_the_same_errors(whole_run, mnist):
    model = main.MNISTClassifier()
    model.load_state_dict(torch.load(whole_run.outputs / "baseline.pt"))
    adapted = PeftModel.from_pretrained(model, whole_run.outputs / "adapter")
    images, labels = mnist[2]

    def wrong():
        said = adapted(images).argmax(1)
        return [int(((labels == x) & (said != x)).sum()) for x in range(10)]

    rows = whole_run.metrics["rows"]
    assert wrong() == errors(rows, "LoRA")
    with adapted.disable_adapter():
        assert wrong() == errors(rows, "baseline")


def test_the_lines_of_the_readme_load_the_adapter(whole_run, monkeypatch, capsys):
    (lines,) = re.findall(r"```python\n(import torch\nfrom peft.+?)```", README, re.DOTALL)
    monkeypatch.chdir(whole_run.outputs.parent)
    (whole_run.outputs.parent / "data").symlink_to(ROOT / "data")
    exec(lines, {})  # noqa: S102
    (printed,) = re.findall(r"0\.\d+", capsys.readouterr().out)
    found = [row["accuracy"] for row in whole_run.metrics["rows"] if row["method"] == "LoRA"]
    assert [float(printed)] == found


def test_the_lines_of_the_readme_are_lora():
    (lines,) = re.findall(r"```python\n(import torch\nfrom torch.+?)```", README, re.DOTALL)
    found = {}
    exec(lines, found)  # noqa: S102
    (lora,) = [m for m in found["model"].modules() if type(m).__name__ == "LoRAParametrization"][:1]
    torch.nn.init.normal_(lora.lora_B)
    layer = found["model"].get_submodule("0")
    wanted = layer.parametrizations.weight.original + lora.lora_B @ lora.lora_A
    torch.testing.assert_close(layer.weight, wanted)
    trained = [name for name, p in found["model"].named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_each_command_of_the_readme_sets_what_it_names():
    commands = re.findall(r"^python main\.py (--[^#\n]+)", README, re.MULTILINE)
    defaults = vars(main.PARSER.parse_args([]))
    assert len(commands) >= 3
    for command in commands:
        options = shlex.split(command)
        settings = vars(main.PARSER.parse_args(options))
        changed = {name for name in settings if settings[name] != defaults[name]}
        assert changed == {x[2:].replace("-", "_") for x in options if x.startswith("--")}
