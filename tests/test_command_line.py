"""Chapter "Command line": options, bad input, interruption, writing, and the same bytes twice."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT, SMALL

import main

LIMITS = {
    "digit": (0, 9),
    "rank": (1, 10),
    "seed": (0, 2**63 - 1),
    "batch_size": (1, 55_000),
    "lora_batch_size": (1, 55_000),
    **dict.fromkeys(["seeds", "epochs", "lora_epochs"], (1, 10**6)),
    "strength": (0, 1),
    "max_accuracy_drop": (0, 100),
    "angle": (0, 360),
}
EMPTY = "'' is not allowed: give a name (--help lists the options)"
NUMBERS = [x for x in fields(main.Settings) if x.type in (int, float, float | None)]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder that holds something from before."""
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "metrics.json").write_text("old")
    return tmp_path / "output"


def saved(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_a_number_is_accepted_from_its_least_to_its_largest(
    field: Field, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "IMAGES", [55_000] * 10)
    option, whole = f"--{field.name.replace('_', '-')}", field.type is int
    least, largest = LIMITS.get(field.name, (1e-20, 1e20))  # alpha and the learning rates
    for value in (least, largest):
        assert getattr(main.parse([option, str(value)]), field.name) == value
    outside = [least - max(least * 1e-9, 1e-30), largest * (1 + 1e-9)]
    outside = [least - 1, largest + 1, 1.5] if whole else outside
    for value in map(str, [*outside, "nan", "inf", "-inf", "x", "", "1" + 400 * "0"]):
        with pytest.raises(main.InputError) as error:
            main.parse([f"{option}={value}"])
        allowed = f"a {'whole ' * whole}number from {least} to {largest} (--help lists the options)"
        assert str(error.value) == f"argument {option}: {value!r} is not allowed: give {allowed}"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nines"], "unrecognized arguments: --nines (--help lists the options)"),
        (["--lora", "1"], "unrecognized arguments: --lora 1 (--help lists the options)"),
        (["--lr"], "argument --lr: expected one argument (--help lists the options)"),
        (["--device", "tpu"], "--device tpu: there is none here, give auto or cpu"),
        (["--device", "CPU"], "--device CPU: there is none here, give auto or cpu"),
        (["--device", "cuda"], "--device cuda: there is none here, give auto or cpu"),
        (["--device", ""], f"argument --device: {EMPTY}"),
        (["--data-dir", ""], f"argument --data-dir: {EMPTY}"),
        (["--output-dir", ""], f"argument --output-dir: {EMPTY}"),
    ],
)
def test_other_mistakes(
    arguments: list[str], line: str, tmp_path: Path, refused: Callable[..., str], monkeypatch
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has it")
    monkeypatch.chdir(tmp_path)
    assert refused(*arguments) == line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("digit", range(10))
def test_a_batch_may_hold_all_images_and_no_more(
    digit: int, tmp_path: Path, refused: Callable[..., str]
) -> None:
    most = main.IMAGES[digit]  # which test_data.py compares with the data
    assert main.parse(["--digit", f"{digit}", "--lora-batch-size", f"{most}"]).digit == digit
    more = ["--digit", digit, "--lora-batch-size", most + 1, "--output-dir", tmp_path / "out"]
    line = f"--lora-batch-size {most + 1}: give at most {most}, all the images of {digit}"
    assert refused(*more) == line
    assert not (tmp_path / "out").exists()


def test_output_folders_that_cannot_be_written(
    tmp_path: Path, small: main.Data, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter").write_text("old")
    (tmp_path / "folder" / "metrics.json").mkdir(parents=True)
    for folder, cause, reason in (
        ("file", "file", "not a folder"),
        ("file/below", "file/below", "Not a directory"),
        ("link", "link", "not a folder"),
        ("taken", "taken/adapter", "not a folder"),
        ("folder", "folder/metrics.json", "Is a directory"),
    ):
        line = f"--output-dir: {tmp_path / cause}: {reason}; "
        assert refused("--output-dir", tmp_path / folder) == f"{line}give another folder"
    assert saved(tmp_path) == {"file": b"old", "taken/adapter": b"old"}


@pytest.mark.parametrize("protected", ["", "adapter", "metrics.json"])
def test_a_folder_or_file_that_is_protected(protected: str, refused: Callable[..., str]) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is closed to others
        (Path(folder) / "adapter").mkdir()
        (Path(folder) / "metrics.json").write_text("old")
        for name in ("", "adapter", "metrics.json"):
            (Path(folder) / name).chmod(0o555 if name == protected else 0o777)
        user = os.geteuid()
        try:
            if user == 0:  # whom no permission stops
                os.seteuid(65534)
            line = refused("--output-dir", folder)
        finally:
            os.seteuid(user)
    cause = Path(folder) / protected
    reason = "Permission denied; give another folder"
    assert line == f"--output-dir: {cause}: {reason}"


@pytest.mark.parametrize(
    ("option", "value", "stage", "options"),
    [
        ("--lr", "1e20", "baseline", "--lr"),
        ("--lora-lr", "1e20", "LoRA", "--lora-lr or --alpha"),
        ("--alpha", "1e20", "LoRA", "--lora-lr or --alpha"),
        ("--full-lr", "1e20", "full fine-tuning", "--full-lr"),
    ],
)
def test_divergence_ends_with_status_1_and_what_to_lower(
    option: str, value: str, stage: str, options: str, small: main.Data, output: Path, capsys
) -> None:
    assert main.main([option, value, *SMALL, "--output-dir", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: {stage}: the loss is ")
    assert line.endswith(f" steps; lower {options}")
    assert saved(output) == {"metrics.json": b"old"}


def test_a_folder_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = main.parse(["--output-dir=~/out", "--data-dir", "~/in"])
    assert (settings.output_dir, settings.data_dir) == (tmp_path / "out", tmp_path / "in")
    assert main.parse(["--output-dir", "~nosuchuser/x"]).output_dir == Path("~nosuchuser/x")


def test_help_names_each_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in fields(main.Settings):
        default = f" (default: {setting.default})" * (setting.default is not None)
        assert f"--{setting.name.replace('_', '-')} " in text
        assert setting.metadata["help"] + default in text
    assert "None" not in text


def test_a_run_is_made_repeatable_before_it_reads_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable[..., str]
) -> None:
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
        assert refused("--output-dir", tmp_path) == "seen"
    finally:
        main.make_repeatable()


def test_same_bytes_in_another_process_at_the_ends_of_the_options(
    small: main.Data, tmp_path: Path
) -> None:
    ends = ["--rank", "10", "--strength", "0", "--max-accuracy-drop", "100", "--lora-lr", "0.01"]
    command = [*ends, "--seed", f"{2**63 - 1}", *SMALL, "--output-dir"]
    torch.save([vars(s) for s in (small.train, small.validation, small.test)], tmp_path / "small")
    there = tmp_path / "new" / "thére"  # which it cannot print
    code = f"""
import sys, torch, main

def load_mnist(folder, device):
    assert not (torch.full((10**7,), 1e-30) * 1e-10).any(), "a thread does not flush denormals"
    return main.Data(*(main.Split(**split) for split in torch.load({str(tmp_path / "small")!r})))

main.load_mnist = load_mnist
sys.exit(main.main({[*command, str(there)]!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=SCRIPT.parent,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONHASHSEED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert main.main([*command, str(tmp_path / "here")]) == 0
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    here = saved(tmp_path / "here")
    assert sorted(here) == sorted(main.OUTPUTS)
    assert here == saved(there)

    (run,) = json.loads(here["metrics.json"])["runs"]
    assert (run["seed"], run["lora_strength"]) == (2**63 - 1, 0)  # the rule would choose 1
    scores = {key: (x["errors"], x["false_positives"]) for key, x in run["methods"].items()}
    assert scores["lora_balanced"] == scores["baseline"] != scores["lora"]


INTERRUPTED = "main.py: interrupted: the output folder holds what it held before\n"
MAIN = f"'{sys.executable}' '{SCRIPT}' --output-dir"


def start(command: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": ""} | environment,
        text=True,
    )


def test_an_interruption_while_importing_says_nothing_and_touches_nothing(output: Path) -> None:
    process = start(f"exec {MAIN} {output}")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) in ((-signal.SIGINT, ""), (130, INTERRUPTED))
    assert saved(output) == {"metrics.json": b"old"}


def test_an_interruption_and_a_reader_that_leaves_early(output: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"  # at the same time, since an import of torch takes seconds
    head = start(f"{MAIN} {other} | head -3; exit ${{PIPESTATUS[0]}}", MPLBACKEND="a notebook's")
    interrupted = start(f"exec {MAIN} {output}")
    for line in interrupted.stdout:
        if "read MNIST" in line:
            interrupted.send_signal(signal.SIGINT)
            break
    _, errors = interrupted.communicate()
    assert (interrupted.returncode, errors) == (130, INTERRUPTED)
    assert saved(output) == {"metrics.json": b"old"}
    text, errors = head.communicate()
    assert (head.returncode, errors, text.count("\n")) == (141, "", 3)
    assert saved(other) == {}


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: the second is too big
    try:
        with pytest.raises(main.InputError) as error:
            main.write_files(tmp_path, {"first": b"new", "second": bytes(2000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value).startswith(f"--output-dir {tmp_path}: File too large; ")
    assert saved(tmp_path) == {"first": b"old"}


def status_of_child(work: Callable[[], None]) -> int:
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
    assert bytes(1000) in found.values()  # half of one
    assert found | old == found
    main.write_files(tmp_path, new)
    assert saved(tmp_path) == new


def test_an_interruption_while_writing_waits_until_all_is_renamed(tmp_path: Path) -> None:
    def interrupted(method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            os.kill(os.getpid(), signal.SIGINT)
            return method(*arguments)

        return call

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Path.write_bytes, Path.replace = map(interrupted, (Path.write_bytes, Path.replace))
        main.write_files(tmp_path, {"first": b"new", "second": b"new"})

    assert status_of_child(work) == 0
    assert saved(tmp_path) == {"first": b"new", "second": b"new"}
