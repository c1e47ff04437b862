"""Options, bad input, interruption, writing, and the same bytes twice."""

import gc
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT

import main

Capture, Patch = pytest.CaptureFixture[str], pytest.MonkeyPatch
OLD = {"metrics.json": b"old"}


def saved(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def error_line(capsys: Capture) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


BELOW = ["--digit=-1", "--rank=0", "--alpha=0", "--seeds=0", "--lora-lr=0"]
ABOVE = ["--digit=10", "--rank=785", f"--seed={2**62 + 1}", "--epochs=1001", "--angle=360.1"]
OTHER = ["--epochs=x", "--lora-lr=nan", "--nines", "--epoch=1"]


@pytest.mark.parametrize("argument", BELOW + ABOVE + OTHER)
def test_a_wrong_argument_is_refused_by_name_and_value(argument: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.parse([argument])
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and len(usage) < 80
    name, _, value = argument.partition("=")
    assert name in line and value in line


def test_the_help_names_what_the_baseline_learns_from(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.parse(["--help"])
    assert "55,000" in capsys.readouterr().out  # as tests/test_data.py counts


@pytest.mark.parametrize("device", ["tpu", "xpu"])
def test_a_device_that_there_is_not_is_named(device: str, tmp_path: Path, capsys: Capture) -> None:
    assert main.main(["--device", device, "--output-dir", str(tmp_path / "out")]) == 2
    assert f"--device {device}: " in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_auto_prefers_an_accelerator(monkeypatch: Patch) -> None:
    there = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert main.pick_device("auto") == there
    assert main.pick_device("cpu").type == "cpu"


def test_bfloat16_is_said_of_a_cpu_alone(monkeypatch: Patch) -> None:
    monkeypatch.setattr(main, "BFLOAT16", True)
    for device, said in (("cpu", b'"bfloat16": true'), ("meta", b'"bfloat16": false')):
        assert said in main.metrics_file(main.Settings(), torch.device(device), [])


def test_an_output_folder_that_cannot_be_written_is_named_before_training(
    small: main.Data, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    (tmp_path / "adapter").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.setattr(main, "train", lambda *_: pytest.fail("not refused before training"))
    for folder in (tmp_path, tmp_path / "adapter", tmp_path / "link"):
        assert main.main([f"--output-dir={folder}"]) == 2
        assert f"--output-dir {folder}: " in error_line(capsys)
    assert saved(tmp_path) == {"adapter": b"old"}


def test_what_diverges_on_new_data_names_its_own_stage_and_writes_nothing(
    small: main.Data, tmp_path: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    main.write_files(tmp_path, OLD)
    monkeypatch.setattr(main, "RANKS", [4])
    monkeypatch.setitem(main.NEW_DATA_LR, "lora_rank4", 1e38)
    assert main.main([f"--output-dir={tmp_path}"]) == 1
    assert {"lora_rank4:", "1e+38"} <= set(error_line(capsys).split())
    assert saved(tmp_path) == OLD


IN_A_THREAD_OF_A_PROCESS = """
import gc, os, signal, sys
from concurrent.futures import ThreadPoolExecutor
def state():
    return signal.getsignal(signal.SIGINT), gc.isenabled(), os.environ.get("MPLBACKEND")
before = state()

import torch, main
def load_mnist(folder, device):
    denormals = torch.full((10**7,), 1e-30) * 1e-10  # so many that all threads of torch compute
    assert not denormals.any()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    return main.Data(*(main.Split(**split) for split in torch.load(folder / "small")))
main.load_mnist = load_mnist

status = ThreadPoolExecutor().submit(main.main, sys.argv[1:]).result()
assert status == 0 and state() == before
"""


def test_a_run_is_the_same_in_a_thread_of_another_process_and_its_main_job_alone(
    small: main.Data, tmp_path: Path
) -> None:
    torch.save([vars(split) for split in small], tmp_path / "small")
    here, there, alone = [f"--output-dir={tmp_path / name}" for name in ("here", "there", "alone")]
    options = ["--rank=12", f"--seed={2**62}", "--lora-lr=0.01", f"--data-dir={tmp_path}"]
    command = [sys.executable, "-c", IN_A_THREAD_OF_A_PROCESS, *options, there]
    environment = os.environ | {"PYTHONHASHSEED": "1", "MPLBACKEND": "svg"}
    environment.pop("CUBLAS_WORKSPACE_CONFIG", None)
    with subprocess.Popen(command, cwd=SCRIPT.parent, env=environment) as process:
        torch.manual_seed(5)  # what was drawn before has no influence
        assert main.main([*options, here]) == 0
        assert main.main([*options, alone, "--main-job-only"]) == 0
    assert process.returncode == 0 and gc.isenabled()
    files = saved(tmp_path / "here")
    assert len(files) == 10 and files == saved(tmp_path / "there")
    rows = json.loads(files["metrics.json"])["rows"]
    assert json.loads(saved(tmp_path / "alone")["metrics.json"])["rows"] == rows[:2]


def test_an_interruption_and_a_full_disk_end_with_their_status_and_a_line(tmp_path: Path) -> None:
    # Ctrl-C reaches what is started here, in a background job too, which ignores it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    main.write_files(tmp_path, OLD)
    script = f"'{sys.executable}' '{SCRIPT}' --main-job-only --output-dir {tmp_path}"
    expected = {  # all at once, since an import of torch takes seconds
        f"exec {script}": (130, "interrupted"),
        f"{script} > /dev/full": (2, "No space left on device"),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(["bash", "-c", command], **pipes) for command in expected]
    assert "LoRA on MNIST" in processes[0].stdout.readline()
    processes[0].send_signal(signal.SIGINT)
    for process, (status, message) in zip(processes, expected.values(), strict=True):
        (line,) = process.communicate()[1].splitlines()
        assert process.returncode == status and message in line
    assert saved(tmp_path) == OLD
    signal.signal(signal.SIGINT, handler)


def test_a_write_that_fails_or_is_killed_leaves_the_old_files(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fail() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as a full disk
        main.write_files(tmp_path, {"metrics.json": b"new", "second": bytes(2000)})

    def be_killed() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which is sent at the byte that is too much
        fail()

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # it may be another disk
    main.write_files(tmp_path, OLD)
    with pytest.raises(main.InputError, match=f"--output-dir {tmp_path}: File too large"):
        fail()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved(tmp_path) == OLD
    child = multiprocessing.get_context("fork").Process(target=be_killed, daemon=True)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGXFSZ
    assert saved(tmp_path).items() >= OLD.items()
