"""One whole run on the real data, small runs of edited scripts, and what README.md shows."""

import json
import re
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import README, RESULTS, ROOT, SOURCE, some
from peft import PeftModel
from test_experiment import network

import main


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
        for name in ("question", "method", "task", "stored"):
            assert row.get(name) == other.get(name)
        margin = 5 if "task" in row else 1.5
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=margin)
        for layer, shares in row.get("shares", {}).items():
            assert shares == pytest.approx(other["shares"][layer], abs=0.03)


def test_the_screen_and_the_files(whole_run):
    lines = whole_run.out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 80 and whole_run.out.isascii()
    output = whole_run.folder / "outputs"
    pictures = {path.stem for path in output.glob("*.png")}
    assert pictures == {"error_counts", "examples", "added", "trade_off", "low_rank", "tasks"}
    assert len(list(output.rglob("*"))) == 6 + 5  # with the weights, metrics.json, and adapter/
    about = torch.__version__, torch.get_num_threads(), dict(torch.cpu.get_capabilities())
    assert tuple(whole_run.environment.values()) == about


def test_the_lines_of_the_readme_and_peft_load_the_adapter(whole_run, mnist, monkeypatch):
    (lines,) = re.findall(r"```python\n(import torch\nimport main.+?)```", README, re.DOTALL)
    monkeypatch.chdir(whole_run.folder)
    found, plain = {}, main.MNISTClassifier()
    exec(lines, found)  # noqa: S102
    plain.load_state_dict(torch.load("outputs/baseline.pt"))
    assert found["model"].state_dict().keys() == plain.state_dict().keys()  # merged
    peft = PeftModel.from_pretrained(plain, "outputs/adapter")

    def check(model, row):
        wrong = mnist[2].labels[main.evaluate(model, mnist[2]).argmax(1) != mnist[2].labels]
        assert torch.bincount(wrong, minlength=10).tolist() == row["errors"]

    check(found["model"], whole_run.rows[1])
    check(peft, whole_run.rows[1])
    with peft.disable_adapter():
        check(peft, whole_run.rows[0])


@pytest.fixture
def run(mnist, tmp_path):
    """The rows and pictures of an edited script, on a few hundred images."""

    def run(source):
        edited = ModuleType("edited")
        edited.__file__ = str(ROOT / "main.py")
        exec(source, edited.__dict__)  # noqa: S102
        edited.MNISTClassifier = network
        edited.load_mnist = lambda *_: [edited.Split(*x) for x in some(mnist, 300, 100, 160)]
        for task in ("rotated", "shuffled"):  # one is enough, and the whole run has all
            getattr(edited, "TASKS", {}).pop(task, None)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        edited.main([f"--output-dir={folder}", "--rank=2"])
        rows = json.loads((folder / "metrics.json").read_text())["rows"]
        return rows, {path.stem for path in folder.glob("*.png")}

    return run


def test_a_question_deleted_then_a_task_added_and_lora_on_one_layer(run, tmp_path):
    whole, pictures = run(SOURCE)
    questions = {"cost": "trade_off", "rank": "low_rank", "tasks": "tasks"}
    for number, (name, picture) in enumerate(questions.items(), 1):
        section = re.search(rf"# --- Question {number}: .*?(?=\n# --- |\nPARTS)", SOURCE, re.DOTALL)
        line = re.search(rf'\n    \("{name}", measure.*', SOURCE)[0]
        rows, left = run(SOURCE.replace(section[0], "").replace(line, ""))
        assert rows == [row for row in whole if row["question"] != name]
        assert left == pictures - {picture}

    call, task = "job.lora = attach_lora(deepcopy(job.baseline), job.rank, job.alpha", '    "mirr'
    source = SOURCE.replace(call, f'{call}, ["5"]')
    rows, left = run(source.replace(task, f'    "upside down": lambda x: x.flip(1),\n{task}'))
    assert {x["stored"] for x in rows if x["method"].startswith("LoRA ")} == {2 * (10 + 50)}
    config = json.loads((tmp_path / "4" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["5"]
    assert left == pictures - {"added"}  # since its lora_A would be no image
    mirrored = [row for row in whole if "task" in row]
    assert [row for row in rows if row.get("task") == "mirrored"] == mirrored
    assert len([row for row in rows if row.get("task") == "upside down"]) == len(mirrored)
