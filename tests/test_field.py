"""What goes wrong in the field: arguments, data, disks, and those who stop a run."""

import errno
import gc
import re
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import PIPES, ROOT, SOURCE

import main


def refused(capsys, *arguments):
    """The one line on stderr of arguments that end with status 2."""
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


WRONG = "--digit=10 --rank=0 --rank=1.5 --alpha=0 --lora-lr=nan --lora-epochs=-1 --seeds=0"
WRONG += " --seed=x --lr=1 --device=tpu --device=cuda:77"


@pytest.mark.parametrize("argument", WRONG.split())
def test_a_wrong_argument_is_refused_by_name_and_value(argument, small, capsys, tmp_path):
    line = refused(capsys, f"--output-dir={tmp_path / 'out'}", "--main-job-only", argument)
    assert all(part in line for part in argument.split("=")) and not list(tmp_path.iterdir())
    assert "cuda" in line or argument != "--device=tpu"  # torch's reason lists what there is


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    defaults = ["9", "1", "1.0", "1", "0.0015", "0", "1", "cpu", str(ROOT / "data"), "outputs"]
    told = re.findall(r"\(default:\s+(\S+)\)", capsys.readouterr().out)
    assert told == [*defaults, "False"]


def test_a_folder_that_cannot_be_made_is_named(small, tmp_path, capsys):
    (tmp_path / "file").write_text("old")
    assert str(tmp_path / "file") in refused(capsys, f"--output-dir={tmp_path / 'file'}")


def test_a_full_disk_is_named_and_leaves_the_old_files(small, tmp_path, monkeypatch, capsys):
    def full(path, content):
        path.open("wb").close()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.chdir(tmp_path)
    foreign = Path("outputs", "adapter", "adapter_model.safetensors")  # which PEFT would read
    foreign.parent.mkdir(parents=True)
    foreign.touch()
    main.main(["--digit=0", "--main-job-only"])
    assert "called 0" in capsys.readouterr().out
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    assert len(old) == 7 and not foreign.exists()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit, match="outputs.*json: No space left"):
        main.main(["--main-job-only"])
    assert all(path.read_bytes() == content for path, content in old.items())


def test_the_splits_are_normalised_and_each_task_changes_them(mnist):
    assert [len(split.labels) for split in mnist] == [55_000, 5_000, 10_000]
    assert [int(split.labels[0]) for split in mnist] == [5, 1, 7]
    images = mnist[2].images[:50]
    assert [images.min(), images.max()] == pytest.approx([-0.4242, 2.8215], abs=1e-4)
    assert torch.equal(main.TASKS["mirrored"](images), images.flip(2))
    shuffle = torch.randperm(784, generator=torch.Generator().manual_seed(0))
    assert torch.equal(main.TASKS["shuffled"](images).flatten(1), images.flatten(1)[:, shuffle])
    spot = torch.full((1, 28, 28), -0.1307 / 0.3081)
    spot[0, 3:5, 13:15] = 1  # 10 pixels above the centre; turned by 30 degrees, 5 to the left
    turned = main.TASKS["rotated"](spot)[0]
    assert turned[4:6, 8:10].min() > 0.3 and turned[:, 12:].max() < 0
    assert turned[0, 0] == spot[0, 0, 0]


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
    layers, told = [], []

    def measure(job):
        layers.append(weakref.ref(job.lora.linear1))
        yield {"method": job.seed}

    def report(rows, job):
        told.append([job.seed, *[row["method"] for row in rows]])

    monkeypatch.setattr(main, "PARTS", [("part", measure, {"picture": report})])
    gc.disable()
    main.main([f"--output-dir={tmp_path}", "--seed=4", "--seeds=4"])
    gc.enable()
    assert told == [[4, 4, 5, 6, 7]] and layers[1]() is None


SCRIPT = """
import gc, os, sys
before = dict(os.environ), gc.get_freeze_count()
import main
assert before == (dict(os.environ), gc.get_freeze_count())
assert "matplotlib.pyplot" not in sys.modules
splits = main.load_mnist(sys.argv.pop(1), "cpu")
main.load_mnist = lambda *_: [split.some(slice(600)) for split in splits]
main.__name__ = "__main__"
exec(sys.argv.pop(1), vars(main))
"""


def test_an_import_changes_nothing_and_who_stops_a_run_keeps_its_first_seeds(mnist, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
    last_lines = SOURCE[SOURCE.index("if __name__") :]
    command = [sys.executable, "-u", "-c", SCRIPT, ROOT / "data", last_lines, "--main-job-only"]
    command += ["--seeds=999", f"--output-dir={tmp_path}"]
    process = subprocess.Popen(command, cwd=ROOT, **PIPES)
    while not process.stdout.readline().startswith("seed 1"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].splitlines() == ["main.py: interrupted"]
    assert process.returncode == 130
    assert '"LoRA, off"' in (tmp_path / "metrics.json").read_text()
