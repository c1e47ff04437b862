"""One whole run on the real data: the published numbers, the files, PEFT, and the README."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import README, RESULTS, ROOT

import main


@pytest.fixture(scope="module")
def whole_run(started):
    folder, process = started
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")  # no bars, no warnings
    metrics = json.loads((folder / "outputs" / "metrics.json").read_text())
    return SimpleNamespace(folder=folder, out=out, **metrics)


def test_the_published_rows_again(whole_run):
    """Exactly, where the baseline is rounded as it was when they were published."""
    published = [row for row in RESULTS["rows"] if row["seed"] == 0]
    assert whole_run.rows == published or whole_run.rows[0] != published[0]
    assert whole_run.config == RESULTS["config"] | {"seeds": 1}
    about = torch.__version__, torch.get_num_threads(), main.BFLOAT16
    assert tuple(whole_run.environment.values()) == about
    for row, other in zip(whole_run.rows, published, strict=True):
        for name in ("question", "method", "task", "layer", "trained"):
            assert row.get(name) == other.get(name)
        if "shares" in row:
            assert row["shares"] == pytest.approx(other["shares"], abs=0.03)
        else:
            margin = 0.05 if "task" in row else 0.015
            assert row["accuracy"] == pytest.approx(other["accuracy"], abs=margin)
        if "missed" in row:
            assert row["missed"] == row["errors"][9] == pytest.approx(other["missed"], abs=12)


def test_the_screen_and_the_files(whole_run):
    lines = whole_run.out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80
    output = whole_run.folder / "outputs"
    pictures = {path.stem for path in output.glob("*.png")}
    assert pictures == {"error_counts", "examples", "learned", "trade_off", "low_rank", "tasks"}
    assert len(list(output.rglob("*"))) == 6 + 5  # with the weights, metrics.json, and adapter/


def test_the_lines_of_the_readme_load_the_adapter_into_peft(whole_run, monkeypatch, capsys):
    (lines,) = re.findall(r"```python\n(import torch\nfrom peft.+?)```", README, re.DOTALL)
    monkeypatch.chdir(whole_run.folder)
    (whole_run.folder / "data").symlink_to(ROOT / "data")
    names = {}
    exec(lines, names)  # noqa: S102
    assert str(whole_run.rows[1]["accuracy"]) in capsys.readouterr().out
    model, images, labels = (names[name] for name in ("model", "images", "labels"))

    def errors():
        return torch.bincount(labels[model(images).argmax(1) != labels], minlength=10).tolist()

    assert errors() == whole_run.rows[1]["errors"]
    with model.disable_adapter():
        assert errors() == whole_run.rows[0]["errors"]


def test_the_lines_of_the_readme_are_lora():
    (lines,) = re.findall(r"```python\n(import torch\nfrom torch.+?)```", README, re.DOTALL)
    found = {}
    exec(lines, found)  # noqa: S102
    layer = found["model"][2]
    lora = layer.parametrizations.weight[0]
    assert not lora.lora_B.any() and not layer.parametrizations.weight.original.requires_grad
    torch.nn.init.normal_(lora.lora_B)
    wanted = layer.parametrizations.weight.original + lora.lora_B @ lora.lora_A
    torch.testing.assert_close(layer.weight, wanted)


def test_each_command_of_the_readme_is_understood():
    commands = re.findall(r"^python main\.py (--[^#\n]+)", README, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        main.PARSER.parse_args(command.split())
