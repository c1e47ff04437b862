"""What goes wrong in the field: streams, folders, devices, data, and those who stop a run."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import PIPES, ROOT
from torch.nn.functional import affine_grid, grid_sample
from torchvision.datasets import MNIST

import main


def refused(capsys, *arguments):
    """The one line on stderr of arguments that end with status 2."""
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    return line


WRONG = "--digit=10 --rank=0 --rank=1.5 --alpha=0 --alpha=2000.0 --lora-lr=nan --lora-epochs=-1"
WRONG += f" --seeds=0 --seed=x --seed={2**64 - 1} --nines --lr=1"
WRONG += " --device=tpu --device=meta --device=hpu --device=cuda:77 --output-dir=~nobody-here/x"


@pytest.mark.parametrize("argument", WRONG.split())
def test_a_wrong_argument_is_refused_by_name_and_value(argument, capsys, tmp_path):
    line = refused(capsys, f"--output-dir={tmp_path / 'out'}", argument)
    assert all(part in line for part in argument.split("=")) and not list(tmp_path.iterdir())


class Gone(io.StringIO):
    """A terminal or a pipe at whose other end there is nobody."""

    def write(self, text):
        raise OSError(errno.EIO, "gone")


class OutStream:
    """A notebook's stream has neither `reconfigure` nor `isatty`."""

    said = ""

    def write(self, text):
        self.said += text

    def flush(self):
        pass


CLOSED, ASCII = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "ascii")
CLOSED.close()


@pytest.mark.parametrize("out", [None, CLOSED, Gone(), OutStream(), ASCII])
def test_any_stdout_and_stderr_will_do(out, small, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", out and OutStream())
    main.main([f"--output-dir={tmp_path}", "--seeds=2", "--main-job-only"])
    assert len(list(tmp_path.rglob("*.*"))) == 7
    if out is ASCII:
        out.said = out.buffer.getvalue().decode()
        assert "(\\xb1deviations" in out.said
    if hasattr(out, "said"):
        assert "seed 1, digit 9" in out.said and f"in {tmp_path}" in out.said


def test_a_bar_on_a_terminal(small, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    main.train(main.MNISTClassifier(), small[0], 0, "odd", 1e-3)
    assert "odd" in capsys.readouterr().err


@pytest.mark.parametrize("place", [2, 3])
def test_results_are_on_disk_before_anything_is_printed_or_drawn(
    place, small, tmp_path, monkeypatch
):
    def fail(*_):
        assert '"baseline"' in (tmp_path / "outputs" / "metrics.json").read_text()
        raise ZeroDivisionError

    part = list(main.PARTS[0])
    part[place] = fail
    monkeypatch.setattr(main, "PARTS", [part])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError):  # which is ours: a traceback
        main.main([])  # and not the arguments of whoever imports it


def test_folders_in_the_home_and_files_of_others(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x" / "adapter").mkdir(parents=True)
    for name in ("adapter/adapter_model.safetensors", "mine.png", "trade_off.png"):
        (tmp_path / "x" / name).write_text("foreign")
    main.main(["--output-dir=~/x", "--data-dir=~/x", "--main-job-only", "--alpha=1000"])
    files = {path.name for path in (tmp_path / "x").rglob("*")}
    assert {"metrics.json", "mine.png", "adapter_model.safetensors.old"} <= files
    assert not {"trade_off.png", "adapter_model.safetensors"} & files
    assert len(files) == 10  # with seven new ones, and the folder of the adapter


def test_a_folder_that_cannot_be_written_is_named_before_training(
    small, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(main, "train", lambda *_: pytest.fail("not refused before training"))
    (tmp_path / "file").write_text("old")

    def denied(dir):
        raise PermissionError(errno.EACCES, "Permission denied")  # as root, nothing else is

    monkeypatch.setattr(tempfile, "TemporaryFile", denied)
    for folder in ("file", "out"):
        line = refused(capsys, f"--output-dir={tmp_path / folder}")
        assert f"--output-dir {tmp_path / folder}: " in line


def test_a_full_disk_leaves_the_old_files(small, tmp_path, capsys, monkeypatch):
    def full(tensors, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    options = f"--output-dir={tmp_path}", "--main-job-only"
    main.main(options)
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    monkeypatch.setattr(torch, "save", full)
    capsys.readouterr()
    assert "No space left" in refused(capsys, *options, "--digit=4")
    assert old == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_the_splits_are_normalised_and_each_task_changes_them(mnist):
    assert [len(split.labels) for split in mnist] == [55_000, 5_000, 10_000]
    pixels, images = MNIST(ROOT / "data", False).data[:50] / 255, mnist[2].images[:50]
    torch.testing.assert_close(images, (pixels - 0.1307) / 0.3081)
    assert torch.equal(main.TASKS["mirrored"](images), images.flip(2))
    shuffled = images.flatten(1)[:, main.SHUFFLE].view(-1, 28, 28)
    assert torch.equal(main.TASKS["shuffled"](images), shuffled)
    turn = torch.tensor([[0.75**0.5, -0.5, 0], [0.5, 0.75**0.5, 0]])  # 30 degrees
    grid = affine_grid(turn.expand(50, 2, 3), (50, 1, 28, 28), align_corners=False)
    turned = (grid_sample(pixels[:, None], grid, align_corners=False)[:, 0] - 0.1307) / 0.3081
    found = main.TASKS["rotated"](images)
    for part in (slice(6, 22), slice(1)):  # the middle, and a corner; between, the two differ
        torch.testing.assert_close(found[:, part, part], turned[:, part, part])


def test_a_missing_or_damaged_archive_is_one_line(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = "--data-dir=~/data", f"--output-dir={tmp_path / 'out'}"
    assert "~/data" in refused(capsys, *options)  # where there is nothing
    raw = tmp_path / "data" / "MNIST" / "raw"
    for path in (ROOT / "data" / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(path, raw)
    damaged = raw / "train-images-idx3-ubyte.gz"
    damaged.write_bytes(b"damaged")
    assert damaged.name in refused(capsys, *options)
    for path in raw.glob("*.gz"):
        path.with_suffix("").write_bytes(b"unpacked in part")
    assert "~/data" in refused(capsys, *options)
    assert not (tmp_path / "out").exists()


SCRIPT = """
import gc, os, sys, torch

def state():
    return dict(os.environ), torch.are_deterministic_algorithms_enabled(), gc.get_freeze_count()

before = state()
import main
assert state() == before and "matplotlib.pyplot" not in sys.modules
sys.stderr.isatty = lambda: True
main.main(["--main-job-only", "--output-dir", sys.argv[1]])
"""


def test_an_import_changes_nothing_and_who_stops_reading_or_stops_the_run(mnist, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
    environment = os.environ | {"MPLBACKEND": "svg", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    how = {"env": environment, "cwd": tmp_path, **PIPES}
    script = [sys.executable, "-c", SCRIPT]
    leave, stop = (subprocess.Popen([*script, folder], **how) for folder in ("leave", "stop"))
    for process in (leave, stop):
        assert process.stdout.readline().startswith("seed 0")
    leave.stdout.close()
    stop.send_signal(signal.SIGINT)
    assert stop.communicate()[1].splitlines() == ["main.py: interrupted"]
    assert stop.returncode == 130
    assert (leave.stderr.read(), leave.wait()) == ("", 0)
    assert len(list(tmp_path.rglob("*.*"))) == 7  # of the one, and none of the other
