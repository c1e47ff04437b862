"""One whole run on the real data, small runs of edited scripts, and what README.md shows."""

import json
import re
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import LOADING, RESULTS, ROOT, SOURCE, some
from peft import PeftModel
from test_experiment import network

import main


@pytest.fixture
def run(mnist, tmp_path, monkeypatch):
    """The rows of an edited script, on a few hundred images."""
    # drawing takes most of the time, and is tested elsewhere
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path: path.touch())

    def run(source):
        edited = ModuleType("edited")
        edited.__file__ = str(ROOT / "main.py")
        exec(source, edited.__dict__)  # noqa: S102
        edited.MNISTClassifier = network
        edited.load_mnist = lambda *_: [edited.Split(*x) for x in some(mnist, 300, 100, 160)]
        for task in ("rotated", "shuffled"):  # one is enough, and the whole run has all
            getattr(edited, "TASKS", {}).pop(task, None)
        edited.main([f"--output-dir={tmp_path}", "--rank=2"])
        return json.loads((tmp_path / "metrics.json").read_text())["rows"]

    return run


def test_lora_on_one_layer_a_task_added_and_a_question_alone(run, tmp_path):
    call = "job.lora = attach_lora(deepcopy(job.baseline), job.rank, job.alpha"
    task = '    "mirr'
    source = SOURCE.replace(call, f'{call}, ["3"]')
    whole = run(source.replace(task, f'    "upside down": lambda x: x.flip(1),\n{task}'))
    assert {x["stored"] for x in whole if x["method"].startswith("LoRA ")} == {140}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["target_modules"], config["r"], config["lora_alpha"]) == (["3"], 2, 1)
    assert len(list(tmp_path.glob("*.png"))) == 5  # not added.png: this lora_A is no image
    added = [row for row in whole if row.get("task") == "upside down"]
    assert len(added) == 6

    parts = re.split(r"\n(?=# --- |PARTS)", source)
    for alone in ("cost", "rank", "tasks"):
        kept = [x for x in parts if "# --- Question" not in x or f"def measure_{alone}(" in x]
        rows = run(re.sub(rf'\n    \("(?!{alone}).*', "", "\n".join(kept)))
        assert rows == [x for x in whole if x["question"] in ("main", alone) and x not in added]


@pytest.fixture(scope="module")
def whole_run(started):
    folder, process = started
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")  # no bars, no warnings
    metrics = json.loads((folder / "outputs" / "metrics.json").read_text())
    return SimpleNamespace(folder=folder, out=out, **metrics)


def test_the_published_rows_again(whole_run):
    """Exactly in the environment that they were published from, about in others."""
    published = [row for row in RESULTS["rows"] if row["seed"] == 0]
    assert whole_run.config == RESULTS["config"] | {"seeds": 1}
    if whole_run.environment == RESULTS["environment"]:
        assert whole_run.rows == published
    for row, other in zip(whole_run.rows, published, strict=True):
        assert row["stored"] == other["stored"]
        margin = 5 if "task" in row else 1.5
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=margin)
        if "shares" in row:
            assert row["shares"]["linear2"] == pytest.approx(other["shares"]["linear2"], abs=0.03)


def test_the_screen_and_the_files(whole_run):
    lines = whole_run.out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80 and whole_run.out.isascii()
    assert len(list((whole_run.folder / "outputs").rglob("*.*"))) == 10


def test_the_lines_of_the_readme_and_peft_load_the_adapter(whole_run, mnist, monkeypatch):
    monkeypatch.chdir(whole_run.folder)
    found = {}
    exec(LOADING, found)  # noqa: S102
    plain = main.MNISTClassifier()
    plain.load_state_dict(torch.load("outputs/baseline.pt"))
    assert not main.lora_layers(found["model"])  # merged
    peft = PeftModel.from_pretrained(plain, "outputs/adapter")

    def right(model):
        return main.accuracy(main.evaluate(model, mnist[2]), mnist[2])

    assert right(found["model"]) == right(peft) == whole_run.rows[1]["accuracy"]
    with peft.disable_adapter():
        assert right(peft) == whole_run.rows[0]["accuracy"]
