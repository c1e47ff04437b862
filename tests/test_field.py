"""What goes wrong in the field: arguments, data, disks, and those who stop a run."""

import gc
import json
import re
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SOURCE
from PIL import Image

import main


def refused(capsys, *arguments):
    """The one line on stderr of arguments that end with status 2."""
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


WRONG = "--digit=10 --rank=0 --rank=1.5 --alpha=0 --lora-lr=nan --lora-epochs=-1 --seeds=0"
WRONG += f" --seed=x --lr=1 --device=tpu --device=cuda:77 --output-dir={__file__}"


@pytest.mark.parametrize("argument", WRONG.split())
def test_a_wrong_argument_is_refused_by_name_and_value(argument, small, capsys, tmp_path):
    line = refused(capsys, f"--output-dir={tmp_path / 'out'}", "--main-job-only", argument)
    assert all(part in line for part in argument.split("=")) and not list(tmp_path.iterdir())
    assert "cuda" in line or argument != "--device=tpu"  # torch's reason lists what there is


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    told = re.findall(r"\(default:\s+(\S+)\)", capsys.readouterr().out)
    assert " ".join(told) == f"9 1 1.0 1 0.0015 0 1 cpu {ROOT / 'data'} outputs False"


def test_the_same_command_gives_the_same_bytes_and_a_full_disk_leaves_them(
    small, tmp_path, monkeypatch, capsys
):
    def full(path, content):
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    foreign = Path("outputs", "adapter", "adapter_model.safetensors")  # which PEFT would read
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    main.main(["--digit=0", "--main-job-only"])
    assert "called 0" in capsys.readouterr().out and not foreign.exists()
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(old) == 7
    main.main(["--digit=0", "--main-job-only"])
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="outputs.*json: No space left"):
        main.main(["--main-job-only"])
    assert [path for path in old if path.read_bytes() != old[path]] == []


def test_the_splits_are_normalised_and_each_task_changes_them(mnist):
    assert [int(split.labels[0]) for split in mnist] == [5, 1, 7]
    images = mnist[2].images[:50]
    assert [images.min(), images.max()] == pytest.approx([-0.4242, 2.8215], abs=1e-4)
    shuffle = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    assert torch.equal(main.TASKS["shuffled"](images).flatten(1), images.flatten(1)[:, shuffle])
    turned = Image.fromarray(images[0].numpy()).rotate(30, Image.BILINEAR, fillcolor=-0.4242)
    assert abs(main.TASKS["rotated"](images)[0].numpy() - turned).mean() < 0.01


def test_missing_or_damaged_data_are_one_line_that_names_the_folder(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", offline)
    options = f"--data-dir={tmp_path}", f"--output-dir={tmp_path / 'out'}"
    assert str(tmp_path) in refused(capsys, *options)  # where there is nothing
    raw = tmp_path / "MNIST" / "raw"
    for path in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(path, raw)
    damaged = raw / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(b"damaged")
    assert damaged.name in refused(capsys, *options)
    for content in (b"", b"unpacked in part"):
        for path in raw.glob("*.gz"):
            path.with_suffix("").write_bytes(content)
        assert str(tmp_path) in refused(capsys, *options)


def test_the_last_seed_reports_all_of_them_with_the_first_and_the_others_are_gone(
    small, tmp_path, monkeypatch
):
    layers = []
    told = []

    def measure(job):
        layers.append(weakref.ref(job.lora.linear1))
        yield {"method": job.seed}

    def report(rows, job):
        told.append([job.seed, *[row["method"] for row in rows]])

    monkeypatch.setattr(main, "PARTS", [("part", measure, {"picture": report})])
    gc.disable()
    main.main([f"--output-dir={tmp_path}", "--seed=4", "--seeds=3"])
    gc.enable()
    assert told == [[4, 4, 5, 6]] and layers[1]() is None


def test_who_stops_a_run_keeps_its_first_seeds(small, tmp_path, monkeypatch, capsys):
    def measure(job):
        if job.seed == 5:
            signal.raise_signal(signal.SIGINT)
        yield {"method": "measured"}

    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
    monkeypatch.setattr(main, "PARTS", [("part", measure, {})])
    monkeypatch.setattr(main, "__name__", "__main__")
    monkeypatch.setattr(
        "sys.argv", ["main.py", "--seed=4", "--seeds=9", f"--output-dir={tmp_path}"]
    )
    with pytest.raises(SystemExit, match="130"):
        exec(SOURCE[SOURCE.index("if __name__") :], vars(main))  # noqa: S102
    gc.unfreeze()
    assert capsys.readouterr().err == "main.py: interrupted\n"
    (row,) = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    assert row["seed"] == 4
