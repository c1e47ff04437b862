"""What goes wrong in the field: streams, folders, devices, data, and those who stop a run."""

import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import ROOT
from torchvision.datasets import MNIST

import main

RAW = ROOT / "data" / "MNIST" / "raw"
ARCHIVES = [name for name, _ in MNIST.resources]


def refused(capsys, *arguments):
    """The one line on stderr of arguments that end with status 2."""
    with pytest.raises(SystemExit) as ended:
        main.main(list(arguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.isprintable()
    return line


WRONG = ["--digit=10", "--rank=0", "--rank=1.5", "--alpha=0", "--alpha=2000.0", "--lora-lr=nan"]
WRONG += ["--lora-epochs=-1", "--seeds=0", "--seed=x", f"--seed={2**64 - 1}", "--nines", "--lr=1"]


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_argument_is_refused_by_name_and_value(argument, capsys):
    line = refused(capsys, argument)
    assert all(part in line for part in argument.split("="))


@pytest.mark.parametrize("device", ["tpu", "meta", "hpu", "cuda:77"])
def test_a_device_that_cannot_compute_is_refused(device, capsys, tmp_path):
    line = refused(capsys, f"--device={device}", f"--output-dir={tmp_path / 'out'}")
    assert f"--device {device}" in line and not list(tmp_path.iterdir())


class Gone(io.StringIO):
    """A terminal or a pipe at whose other end there is nobody."""

    def write(self, text):
        raise OSError(errno.EIO, "gone")


class OutStream:
    """A notebook's stream has neither `reconfigure` nor `isatty`."""

    encoding, said = "UTF-8", ""

    def write(self, text):
        self.said += text

    def flush(self):
        pass


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS = {
    "none": lambda: None,
    "closed": closed,
    "gone": Gone,
    "notebook": OutStream,
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), "ascii"),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_any_stdout_and_stderr_will_do(kind, small, tmp_path, monkeypatch):
    out = STREAMS[kind]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None if kind == "none" else OutStream())
    main.main([f"--output-dir={tmp_path}", "--seeds=2", "--main-job-only"])
    assert len(list(tmp_path.rglob("*.*"))) == 7
    if kind == "ascii":
        assert b"mean\\xb1deviation" in out.buffer.getvalue()
        assert f"in {tmp_path}".encode() in out.buffer.getvalue()
    assert kind != "notebook" or f"in {tmp_path}" in out.said


def test_a_bar_on_a_terminal(small, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    main.train(main.MNISTClassifier(), small[0], 0, "odd", 1e-3)
    assert "odd" in sys.stderr.getvalue()


def test_results_are_on_disk_before_anything_is_printed_or_drawn(small, tmp_path, monkeypatch):
    def fail(*_):
        assert json.loads((tmp_path / "metrics.json").read_text())["rows"]
        assert (tmp_path / "adapter" / "adapter_model.bin").exists()
        raise ZeroDivisionError

    options = [f"--output-dir={tmp_path}", "--main-job-only"]
    for place in (2, 3):
        part = list(main.PARTS[0])
        part[place] = fail
        monkeypatch.setattr(main, "PARTS", [tuple(part)])
        with pytest.raises(ZeroDivisionError):  # which is ours: a traceback
            main.main(options)
        shutil.rmtree(tmp_path)


def test_folders_in_the_home_and_files_of_others(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    adapter = tmp_path / "x" / "adapter"
    adapter.mkdir(parents=True)
    for path in (adapter / "adapter_model.safetensors", tmp_path / "x" / "mine.png"):
        path.write_text("foreign")
    (tmp_path / "x" / "trade_off.png").write_text("of another run")
    main.main(["--output-dir=~/x", "--main-job-only", "--alpha=1000", "--lora-lr=1e-6"])
    assert (tmp_path / "x" / "metrics.json").exists()
    assert (tmp_path / "x" / "mine.png").read_text() == "foreign"
    assert not (tmp_path / "x" / "trade_off.png").exists()
    assert not (adapter / "adapter_model.safetensors").exists()
    assert (adapter / "adapter_model.safetensors.old").read_text() == "foreign"
    assert {path.name for path in (tmp_path / "x").iterdir() if path.is_dir()} == {"adapter"}


def test_a_folder_that_cannot_be_written_is_named_before_training(
    small, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(main, "train", lambda *_: pytest.fail("not refused before training"))
    (tmp_path / "file").write_text("old")
    adapter = tmp_path / "out" / "adapter"
    adapter.mkdir(parents=True)
    adapter.chmod(0o500)
    if os.getuid() == 0:  # who may write everywhere
        make = tempfile.TemporaryFile
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: make(dir=dir / "none"))
    for folder in ("file", "out"):
        line = refused(capsys, f"--output-dir={tmp_path / folder}")
        assert f"--output-dir {tmp_path / folder}: " in line
    assert (tmp_path / "file").read_text() == "old"


def test_a_full_disk_leaves_the_old_files(small, tmp_path, capsys, monkeypatch):
    main.main([f"--output-dir={tmp_path}", "--main-job-only"])
    old = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}

    def full(tensors, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    capsys.readouterr()
    line = refused(capsys, f"--output-dir={tmp_path}", "--main-job-only", "--digit=4")
    assert "No space left" in line
    assert old == {path: path.read_bytes() for path in tmp_path.rglob("*.*")}


def test_diverged_training_of_a_question_writes_nothing(small, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "FULL_LR", 1e38)
    with pytest.raises(SystemExit, match="full fine-tuning: training diverged.* 1e\\+38"):
        main.main([f"--output-dir={tmp_path}"])
    assert not list(tmp_path.rglob("*.*"))


def test_the_splits_are_the_archives_normalised(mnist):
    files = [bytearray(gzip.decompress((RAW / name).read_bytes())) for name in ARCHIVES]
    train, train_labels, test, test_labels = [torch.frombuffer(x, dtype=torch.uint8) for x in files]
    assert [len(split.images) for split in mnist] == [55_000, 5_000, 10_000]
    labels = torch.cat([train_labels[8:], test_labels[8:]]).long()
    assert torch.equal(torch.cat([split.labels for split in mnist]), labels)
    images = torch.cat([train[16:], test[16:]]).view(-1, 28, 28)[::1000]
    found = torch.cat([split.images[::1000] for split in mnist])
    torch.testing.assert_close(found, (images / 255 - 0.1307) / 0.3081)


def test_the_tasks_turn_mirror_and_shuffle(mnist):
    images = mnist[2].images[:50]
    shuffled = main.TASKS["shuffled"](images)
    assert torch.equal(main.TASKS["mirrored"](images), images.flip(2))
    assert not torch.equal(shuffled, images) and shuffled.shape == images.shape
    assert torch.equal(shuffled.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    column = shuffled.flatten(1)[:, 300]  # one place of all images comes from one place
    assert any(torch.equal(column, pixels) for pixels in images.flatten(1).T)
    # counter-clockwise: a bar from the middle to the right ends up above the middle
    bar = torch.full((1, 28, 28), -0.1307 / 0.3081)
    bar[0, 13:15, 14:26] = 2.0
    turned = main.TASKS["rotated"](bar)[0]
    rows, columns = (turned > 1).nonzero().double().mean(0)
    assert (13.5 - rows) / (columns - 13.5) == pytest.approx(3**-0.5, abs=0.1)
    torch.testing.assert_close(turned[[0, 0, -1, -1], [0, -1, 0, -1]], bar[0, 0, :4])


def test_a_missing_or_damaged_archive_is_one_line(tmp_path, capsys, monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--data-dir=~/data", f"--output-dir={tmp_path / 'out'}"]
    assert "~/data" in refused(capsys, *options)  # where there is nothing
    raw = tmp_path / "data" / "MNIST" / "raw"
    for name in ARCHIVES:
        shutil.copy(RAW / name, raw)
    (raw / ARCHIVES[0]).write_bytes(b"damaged")
    line = refused(capsys, *options)
    assert ARCHIVES[0] in line and "~/data" in line
    for name in ARCHIVES:
        (raw / name.removesuffix(".gz")).write_bytes(b"unpacked in part")
    assert "~/data" in refused(capsys, *options)
    assert not (tmp_path / "out").exists()


def test_who_stops_reading_and_who_stops_the_run(mnist, tmp_path):
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job, too
    script = [sys.executable, str(ROOT / "main.py"), "--main-job-only", "--output-dir"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    leave, stop = (subprocess.Popen([*script, tmp_path / x], **pipes) for x in ("leave", "stop"))
    for process in (leave, stop):
        assert process.stdout.readline().startswith("seed 0")
    leave.stdout.close()
    stop.send_signal(signal.SIGINT)
    assert stop.communicate()[1].splitlines() == ["main.py: interrupted"]
    assert stop.returncode == 130 and not list((tmp_path / "stop").rglob("*.*"))
    assert (leave.stderr.read(), leave.wait()) == ("", 0)
    assert len(list((tmp_path / "leave").rglob("*.*"))) == 7
    signal.signal(signal.SIGINT, handler)


ELSEWHERE = """
import gc, io, os, sys, torch
def state():
    return dict(os.environ), torch.are_deterministic_algorithms_enabled(), gc.get_freeze_count()
before = state()
import main
assert state() == before and "matplotlib.pyplot" not in sys.modules

class Terminal(io.StringIO):
    isatty = lambda self: True
sys.stderr = Terminal()
assert [*main.progress([1, 2], "odd")] == [1, 2] and sys.stderr.getvalue() == ""
"""


def test_an_import_changes_nothing_and_no_bar_where_tqdm_is_disabled(tmp_path):
    environment = os.environ | {"MPLBACKEND": "svg", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    subprocess.run([sys.executable, "-c", ELSEWHERE], check=True, env=environment, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
