"""The edits that a reader makes: each question deleted, LoRA on one layer, another network."""

import json
import re
from types import ModuleType

import pytest
from conftest import ROOT, some
from matplotlib.figure import Figure
from test_experiment import network

SOURCE = (ROOT / "main.py").read_text()


@pytest.fixture
def run(mnist, tmp_path, monkeypatch):
    """The rows of an edited script, on a few hundred images; of pictures, the note is saved."""
    splits = some(mnist, 300, 100, 160)
    monkeypatch.setattr(Figure, "savefig", lambda x, path, **_: path.write_text(x.get_supxlabel()))

    def run(source):
        edited = ModuleType("edited")
        edited.__file__ = str(ROOT / "main.py")
        exec(compile(source, "edited.py", "exec"), edited.__dict__)  # noqa: S102
        edited.MNISTClassifier = network
        edited.load_mnist = lambda *_: [edited.Split(*split) for split in splits]
        for task in ("rotated", "shuffled"):  # one is enough, and the whole run has all
            getattr(edited, "TASKS", {}).pop(task, None)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        edited.main([f"--output-dir={folder}", "--rank=2"])
        pictures = {path.stem: path.read_text() for path in folder.glob("*.png")}
        return json.loads((folder / "metrics.json").read_text())["rows"], pictures

    return run


def test_a_question_deleted_then_a_task_added_and_lora_on_one_layer(run, tmp_path):
    whole, pictures = run(SOURCE)
    assert len(pictures) == 6 and set(pictures.values()) == {"seeds: 1, images: seed 0"}
    questions = {"cost": "trade_off", "rank": "low_rank", "tasks": "tasks"}
    for number, (name, picture) in enumerate(questions.items(), 1):
        section = re.search(rf"# --- Question {number}: .*?(?=\n# --- )", SOURCE, re.DOTALL)[0]
        line = re.search(rf'\n    \("{name}", measure.*', SOURCE)[0]
        rows, left = run(SOURCE.replace(section, "").replace(line, ""))
        assert rows == [row for row in whole if row["question"] != name]
        assert left.keys() == pictures.keys() - {picture}

    call, task = "attach_lora(deepcopy(baseline), settings.rank, settings.alpha", '    "mirrored": '
    source = SOURCE.replace(call, f'{call}, ["5"]')
    rows, left = run(source.replace(task, f'    "upside down": lambda x: x.flip(1),\n{task}'))
    assert rows[1]["trained"] == 2 * (10 + 50)
    config = json.loads((tmp_path / "4" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["5"]
    assert "learned" not in left  # since its lora_A would be no image
    mirrored = [row for row in whole if "task" in row]
    assert [row for row in rows if row.get("task") == "mirrored"] == mirrored
    assert len([row for row in rows if row.get("task") == "upside down"]) == len(mirrored)
