"""Options, bad input, interruption, writing, and the same bytes twice."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SCRIPT

import main

NUMBERS = {
    "digit": (0, 9),
    "rank": (1, 784),
    "alpha": (0.001, 1000),
    "seed": (0, 2**62),
    "seeds": (1, 1000),
    "epochs": (1, 1000),
    "lr": (1e-6, 10),
    "lora_epochs": (1, 1000),
    "lora_lr": (1e-6, 10),
    "angle": (0, 360),
}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder that holds something from before."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "metrics.json").write_text("old")
    return tmp_path / "output"


def saved(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error line with which argparse refuses some arguments."""
    with pytest.raises(SystemExit) as exit:
        main.main(list(arguments))
    assert exit.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and len(usage) < 80
    return line


def test_each_number_is_accepted_between_its_limits_and_no_further(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = {x.name: x.type for x in fields(main.Settings) if x.type in (int, float)}
    assert numbers.keys() == NUMBERS.keys()
    for name, (least, most) in NUMBERS.items():
        option = f"--{name.replace('_', '-')}"
        for value in (least, most):
            assert getattr(main.parse([f"{option}={value}"]), name) == value
        step = 1 if numbers[name] is int else 1e-9
        for value in (least - step, most + max(step, most * 1e-9), "x", "", "nan", "1" + 400 * "0"):
            line = refused(capsys, f"{option}={value}")
            assert f"argument {option}: " in line
            if value not in ("x", "") and numbers[name] is float:
                assert f"give {least} to {most}" in line


def test_other_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert refused(capsys, "--nines").endswith("unrecognized arguments: --nines")
    assert refused(capsys, "--lora", "1").endswith("unrecognized arguments: --lora 1")
    for device in ("tpu", "CPU", "mps", ""):
        arguments = ["--device", device, "--output-dir", str(tmp_path / "out")]
        assert main.main(arguments) == 2
        line = f"main.py: --device {device}: there is none here; give auto or cpu\n"
        assert capsys.readouterr().err == line
    assert list(tmp_path.iterdir()) == []


def test_at_most_16_options_each_with_its_default_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    assert exit.value.code == 0
    help = " ".join(capsys.readouterr().out.split())
    assert len(fields(main.Settings)) <= 16
    for setting in fields(main.Settings):
        text = f"{setting.metadata['help']} (default: {setting.default})"
        assert f"--{setting.name.replace('_', '-')} " in help and text in help
    assert main.parse([]) == main.Settings()
    assert main.parse(["--main-job-only"]).main_job_only


def test_numbers_that_the_help_and_the_docstrings_name(mnist: main.Data) -> None:
    assert len(mnist.train.labels) == 55_000  # as --epochs says
    assert main.count_trainable(main.MNISTClassifier()) == 2_807_010
    assert "2,807,010" in main.MNISTClassifier.__doc__
    assert "55,000" in {x.name: x for x in fields(main.Settings)}["epochs"].metadata["help"]


def test_bfloat16_is_said_of_a_cpu_alone() -> None:
    for name, expected in (("cpu", main.BFLOAT16), ("meta", False)):
        content = json.loads(main.metrics(main.Settings(), torch.device(name), []))
        assert content["environment"]["bfloat16"] == expected


def test_auto_prefers_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, device in ((torch.device("meta"), "meta"), (None, "cpu")):
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available, there=there: there
        )
        assert main.pick_device("auto").type == device
    assert main.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("place", ["file", "file/below", "link", "taken"])
def test_output_folders_that_cannot_be_written(
    place: str, tmp_path: Path, small: main.Data, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter").write_text("old")
    monkeypatch.setattr(main, "train", lambda *_: pytest.fail("not refused before training"))
    assert main.main(["--output-dir", str(tmp_path / place)]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"main.py: --output-dir {tmp_path / place}: ")
    assert line.endswith("; give another folder\n")
    assert saved(tmp_path) == {"file": b"old", "taken/adapter": b"old"}


def test_divergence_ends_with_status_1_and_what_to_lower(
    small: main.Data, output: Path, capsys, monkeypatch
) -> None:
    forward = main.MNISTClassifier.forward  # so that it does diverge, on any machine
    monkeypatch.setattr(main.MNISTClassifier, "forward", lambda m, x: forward(m, x) ** 9)
    assert main.main(["--lr", "10", "--epochs", "30", "--output-dir", str(output)]) == 1
    line = "main.py: baseline: training diverged; lower its learning rate, 10\n"
    assert capsys.readouterr().err == line
    assert saved(output) == {"metrics.json": b"old"}


def test_what_diverges_on_new_data_names_its_own_stage(
    small: main.Data, output: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setitem(main.NEW_DATA_LR, "lora_rank4", 1e38)
    assert main.main(["--output-dir", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "lora_rank4" in line and line.endswith("diverged; lower its learning rate, 1e+38")
    assert saved(output) == {"metrics.json": b"old"}


def test_the_script_is_repeatable_before_it_reads_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def state(*_: object) -> None:
        denormal = torch.full((10,), 1e-30) * 1e-10
        assert torch.are_deterministic_algorithms_enabled()
        assert not denormal.any()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        raise main.InputError("seen")

    monkeypatch.setattr(main, "load_mnist", state)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(False)
    torch.set_flush_denormal(False)
    try:
        assert main.main([]) == 2
    finally:
        main.make_repeatable()


def test_same_bytes_in_another_process(small: main.Data, tmp_path: Path) -> None:
    options = ["--rank", "12", "--seed", f"{2**62}", "--lora-lr", "0.01"]
    torch.save([vars(s) for s in (small.train, small.validation, small.test)], tmp_path / "small")
    code = f"""
import sys, torch, main

def load_mnist(folder, device):
    assert not (torch.full((10**7,), 1e-30) * 1e-10).any(), "a thread does not flush denormals"
    return main.Data(*(main.Split(**split) for split in torch.load({str(tmp_path / "small")!r})))

main.load_mnist = load_mnist
sys.exit(main.main({[*options, "--output-dir", str(tmp_path / "there")]!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=SCRIPT.parent,
        env=os.environ | {"PYTHONHASHSEED": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    torch.manual_seed(5)  # what was drawn before has no influence
    assert main.main([*options, "--output-dir", str(tmp_path / "here")]) == 0
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    here = saved(tmp_path / "here")
    assert len(here) == 10
    assert here == saved(tmp_path / "there")
    rows = json.loads(here["metrics.json"])["rows"]
    assert {row["seed"] for row in rows} == {2**62}


def test_the_main_job_alone_gives_the_same_rows(small: main.Data, tmp_path: Path) -> None:
    for folder, more in (("all", []), ("main", ["--main-job-only"])):
        assert main.main([*more, "--output-dir", str(tmp_path / folder)]) == 0
    whole, alone = (
        json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("all", "main")
    )
    assert [row["method"] for row in alone["rows"]] == ["baseline", "lora"]
    assert whole["rows"][:2] == alone["rows"]


# --- As a process, and inside another program -----------------------------------------------------


def start(command: str) -> subprocess.Popen[str]:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        return subprocess.Popen(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def test_an_interruption_a_reader_that_leaves_early_and_a_full_disk(
    output: Path, tmp_path: Path
) -> None:
    script = f"'{sys.executable}' '{SCRIPT}' --main-job-only --output-dir"
    other = tmp_path / "other"  # at the same time, since an import of torch takes seconds
    head = start(f"{script} {other} | head -1; exit ${{PIPESTATUS[0]}}")
    full = start(f"{script} {tmp_path / 'full'} > /dev/full")
    interrupted = start(f"exec {script} {output}")
    for line in interrupted.stdout:
        if "LoRA on MNIST" in line:
            interrupted.send_signal(signal.SIGINT)
            break
    _, errors = interrupted.communicate()
    assert interrupted.returncode == 130
    assert errors == "main.py: interrupted: each file in the output folder is whole\n"
    assert saved(output) == {"metrics.json": b"old"}
    text, errors = head.communicate()
    assert (head.returncode, errors, text.count("\n")) == (141, "", 1)
    assert saved(other) == {}
    _, errors = full.communicate()
    assert full.returncode == 2
    assert errors == "main.py: cannot print: No space left on device; send the output elsewhere\n"


def test_importing_and_running_change_nothing_for_the_importer(
    small: main.Data, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGINT), gc.isenabled(), os.environ.get("MPLBACKEND")
    statuses = []
    arguments = ["--main-job-only", "--output-dir", str(tmp_path)]
    thread = threading.Thread(target=lambda: statuses.append(main.main(arguments)))
    thread.start()
    thread.join()
    assert statuses == [0] and main.main(arguments) == 0
    after = signal.getsignal(signal.SIGINT), gc.isenabled(), os.environ.get("MPLBACKEND")
    assert after == before


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"old")
    (tmp_path / "adapter").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: the second is too big
    try:
        with pytest.raises(main.InputError) as error:
            main.write_files(tmp_path, {"first": b"new", "second": bytes(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"--output-dir {tmp_path}: File too large; ")
    assert saved(tmp_path) == {"first": b"old"}
    main.write_files(tmp_path, {"first": b"new"})  # the lock of the one that failed is gone
    assert saved(tmp_path) == {"first": b"new"}


def status_of_child(work: Callable[[], Any]) -> int:
    """The status, below 0 for a signal, of a process that does some work and nothing else."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(sys.exc_info()[0] is not None)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_while_writing_leaves_the_old_files_whole(tmp_path: Path) -> None:
    def killed() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the kernel kills it at this byte
        main.write_files(tmp_path, {"first": b"new", "second": bytes(2000)})

    old, new = (dict.fromkeys(["first", "second"], content) for content in (b"old", b"new"))
    main.write_files(tmp_path, old)
    assert status_of_child(killed) == -signal.SIGXFSZ
    found = saved(tmp_path)
    assert found | old == found
    main.write_files(tmp_path, new)  # the lock of the killed one is gone with it
    assert saved(tmp_path).items() >= new.items()


def test_two_runs_in_one_folder_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def slowly(path: Path, target: Path) -> Path:
        """Without a lock, one comes last with "second", the other with the rest."""
        first = threading.current_thread() is threads[0]
        slow = first == (target.name == "second")
        time.sleep((0.3 if first else 0.2) if slow else 0.02)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", slowly)
    names = ["first", "adapter/second", "third"]
    sets = [dict.fromkeys(names, content) for content in (b"one", b"two")]
    threads = [threading.Thread(target=main.write_files, args=(tmp_path, x)) for x in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert saved(tmp_path) in sets


def test_an_interruption_while_writing_waits_until_all_is_renamed(
    small: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--main-job-only", "--output-dir", str(tmp_path)]
    assert main.main([*arguments, "--seed", "1"]) == 0
    old = saved(tmp_path)
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if target.name == "examples.png":  # the first of all
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.03)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main.main([*arguments, "--seed", "2"]) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    new = saved(tmp_path)
    assert new.keys() == old.keys()
    assert all(new[name] != old[name] for name in old if name != "adapter/adapter_config.json")
