"""The edits that a reader makes: each question deleted, LoRA on one layer, another network."""

import json
import re
from types import ModuleType

import pytest
import torch
from conftest import ROOT, some
from matplotlib.figure import Figure

SOURCE = (ROOT / "main.py").read_text()
for old, new in (
    ("(784, 1000)", "(784, 60)"),
    ("(1000, 2000)", "(60, 50)"),
    ("(2000, 10)", "(50, 10)"),
):
    assert SOURCE.count(old) == 1
    SOURCE = SOURCE.replace(old, new)  # the class alone is edited
QUESTIONS = {"cost": "trade_off.png", "rank": "low_rank.png", "tasks": "tasks.png"}


@pytest.fixture
def run(mnist, tmp_path, monkeypatch):
    """The rows of an edited script, on a few hundred images; of pictures, the note is saved."""
    splits = some(mnist, 300, 100, 160)
    monkeypatch.setattr(Figure, "savefig", lambda x, path, **_: path.write_text(x.get_supxlabel()))

    def of(source, *options):
        edited = ModuleType("edited")
        edited.__file__ = str(ROOT / "main.py")
        exec(compile(source, "edited.py", "exec"), edited.__dict__)  # noqa: S102
        edited.load_mnist = lambda folder, device: [edited.Split(*split) for split in splits]
        for task in ("rotated", "shuffled"):  # one is enough, and the whole run has all
            getattr(edited, "TASKS", {}).pop(task, None)
        edited.main([f"--output-dir={tmp_path}", "--rank=2", *options])
        return json.loads((tmp_path / "metrics.json").read_text())["rows"]

    return of


def replace(old, new):
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


def without(number, name):
    (chapter,) = re.findall(rf"# --- Question {number}: .*?(?=\n# --- )", SOURCE, re.DOTALL)
    (line,) = re.findall(rf'\n    \("{name}", measure.*', SOURCE)
    return SOURCE.replace(chapter, "").replace(line, "")


def test_each_question_can_be_deleted_with_its_line(run, tmp_path):
    whole = run(SOURCE)
    for number, (name, picture) in enumerate(QUESTIONS.items(), 1):
        assert (tmp_path / picture).read_text() == "seeds: 1, images: seed 0"
        (tmp_path / picture).unlink()
        assert run(without(number, name)) == [row for row in whole if row["question"] != name]
        assert not (tmp_path / picture).exists()
        run(SOURCE, "--main-job-only")
        assert len(list(tmp_path.glob("*.png"))) == 3
        run(SOURCE)
        assert len(list(tmp_path.glob("*.png"))) == 6


def test_lora_on_the_last_layer_alone(run, tmp_path):
    (tmp_path / "learned.png").touch()  # of another run
    call = "attach_lora(deepcopy(baseline), settings.rank, settings.alpha"
    rows = run(replace(call, f'{call}, ["linear3"]'), "--main-job-only")
    assert rows[1]["trained"] == 2 * (10 + 50)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["linear3"]
    state = torch.load(tmp_path / "adapter" / "adapter_model.bin")
    assert {name.split(".")[2] for name in state} == {"linear3"}
    assert not (tmp_path / "learned.png").exists()  # whose lora_A would be no image


def test_another_task_and_another_network(run):
    task = '    "mirrored": '
    rows = run(replace(task, f'    "upside down": lambda x: x.flip(1),\n{task}'))
    numbers = 784 * 60 + 60 + 60 * 50 + 50 + 50 * 10 + 10
    assert [row["trained"] for row in rows[:2]] == [numbers, 2 * (784 + 60 + 60 + 50 + 50 + 10)]
    assert {row["task"] for row in rows if "task" in row} == {"mirrored", "upside down"}
    others = [row for row in rows if row.get("task") != "upside down"]
    assert others == run(SOURCE)
