"""Chapter "Command line": options, bad input, interruption, and the same bytes twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import SCRIPT, SMALL

import main

POSITIVE = ["0", "-1", "-0.5", "nan", "inf", "-inf", "-1e-3", "1e39", "1e-310", "x", ""]
COUNTS = ["0", "-1", "1.5", "nan", "inf", "x", "1" + 400 * "0"]
BAD = {
    "--digit": ["10", "-1", "9.5", "nine"],
    "--rank": ["0", "-1", "11", "1.5"],
    "--seed": ["-1", str(2**63), "0.5"],
    "--strength": ["-0.1", "1.1", "nan"],
    "--max-accuracy-drop": ["-1", "101", "nan", "inf"],
    "--device": ["tpu", "CPU"],
    "--data-dir": [""],
    **dict.fromkeys(["--alpha", "--lr", "--lora-lr", "--full-lr"], POSITIVE),
    **dict.fromkeys(
        ["--seeds", "--epochs", "--batch-size", "--lora-epochs", "--lora-batch-size"], COUNTS
    ),
}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """An output folder that holds something from before."""
    (tmp_path / "metrics.json").write_text("old")
    return tmp_path


def refused(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which `arguments` are refused; what was saved before is untouched."""
    assert main.main([*arguments, "--output-dir", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (output / "metrics.json").read_text() == "old"
    assert line.startswith("main.py: ")
    return line


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, values in BAD.items() for v in values])
def test_a_bad_value_is_named_with_what_is_allowed(
    option: str, value: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([option, value], output, capsys)
    assert f"argument {option}: {value!r} is not allowed: give " in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--nines"], "unrecognized arguments: --nines"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--lora", "1"], "unrecognized arguments: --lora"),
        (["--seed", str(2**63 - 1), "--seeds", "2"], "the last seed is above 2^63 - 1"),
    ],
)
def test_other_mistakes(
    arguments: list[str], part: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert part in refused(arguments, output, capsys)


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(
    name: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}[name]:
        pytest.skip(f"this machine has {name}")
    assert f"--device {name}: there is none here" in refused(["--device", name], output, capsys)


def test_an_output_folder_that_cannot_be_written(
    tmp_path: Path, small: main.Data, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "train", lambda *_: pytest.fail("found out only after training"))
    (tmp_path / "file").write_text("old")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter").write_text("old")
    for folder, cause in (
        (tmp_path / "file", tmp_path / "file"),
        (tmp_path / "file" / "below", tmp_path / "file" / "below"),
        (tmp_path / "taken", tmp_path / "taken" / "adapter"),
        (Path("/proc/outputs"), Path("/proc/outputs")),
    ):
        assert main.main(["--output-dir", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--output-dir {folder}: {cause}: " in line
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize(
    ("option", "value", "stage"),
    [
        ("--lr", "1e20", "baseline"),
        ("--lora-lr", "1e20", "LoRA"),
        ("--alpha", "1e18", "LoRA"),
        ("--full-lr", "1e20", "full fine-tuning"),
    ],
)
def test_divergence_ends_with_status_1_and_what_to_lower(
    option: str, value: str, stage: str, small, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main([option, value, *SMALL, "--output-dir", str(output)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"main.py: {stage}: ")
    assert " step" in line
    assert option in line.partition("lower ")[2]
    assert (output / "metrics.json").read_text() == "old"


def test_a_folder_may_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = main.parse(["--output-dir", "~/out", "--data-dir", "~/in"])
    assert (settings.output_dir, settings.data_dir) == (tmp_path / "out", tmp_path / "in")


def test_help_names_each_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main.main(["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in main.fields(main.Settings):
        assert "--" + setting.name.replace("_", "-") in text
        assert setting.default is None or f"(default: {setting.default})" in text


def saved(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_command_same_bytes_in_another_process_too(small: main.Data, tmp_path: Path) -> None:
    assert main.main([*SMALL, "--output-dir", str(tmp_path / "here")]) == 0
    torch.save([vars(s) for s in (small.train, small.validation, small.test)], tmp_path / "small")
    code = f"""
import sys, torch, main
splits = [main.Split(**tensors) for tensors in torch.load({str(tmp_path / "small")!r})]
main.read_data = lambda folder, device: main.Data(*splits)
sys.exit(main.main({[*SMALL, "--output-dir", str(tmp_path / "there")]!r}))
"""
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, check=True, capture_output=True)
    here, there = saved(tmp_path / "here"), saved(tmp_path / "there")
    assert sorted(here) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.bin",
        "baseline.pt",
        "error_counts.png",
        "examples.png",
        "low_rank.png",
        "metrics.json",
        "trade_off.png",
    ]
    assert here == there


def test_python_with_o_strips_no_check(
    small: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimised = ModuleType("optimised")  # compiled as by `python -O`; all of torch would take long
    monkeypatch.setitem(sys.modules, "optimised", optimised)
    vars(optimised)["__file__"] = str(SCRIPT)
    exec(compile(SCRIPT.read_text(), SCRIPT, "exec", optimize=1), vars(optimised))  # noqa: S102
    optimised.read_data = lambda folder, device: small
    assert optimised.main([*SMALL, "--output-dir", str(tmp_path)]) == 0
    layer = torch.nn.Linear(2, 2)
    for check, arguments in {
        optimised.check_frozen: ({"bias": layer.bias.detach() + 1}, layer),
        optimised.check_off: (torch.zeros(1, 10), torch.ones(1, 10)),
        optimised.check_merged: (torch.eye(10), torch.eye(10).flip(0)),
        optimised.check_overhead: (1, 100, 1),
    }.items():
        with pytest.raises(optimised.RunError):
            check(*arguments)


def test_two_seeds_are_two_single_runs(small: main.Data, tmp_path: Path) -> None:
    runs = {}
    for name, arguments in {
        "both": ["--seed", "4", "--seeds", "2"],
        "first": ["--seed", "4"],
        "second": ["--seed", "5"],
    }.items():
        assert main.main([*arguments, *SMALL, "--output-dir", str(tmp_path / name)]) == 0
        runs[name] = json.loads((tmp_path / name / "metrics.json").read_text())["runs"]
    assert runs["both"] == [*runs["first"], *runs["second"]]
    assert runs["first"][0]["methods"] != runs["second"][0]["methods"]
    both, first = saved(tmp_path / "both"), saved(tmp_path / "first")
    for name in ("baseline.pt", "adapter/adapter_model.bin", "adapter/adapter_config.json"):
        assert both[name] == first[name]


def test_interruption_leaves_the_outputs_of_before(output: Path) -> None:
    # a shell starts a background job with SIGINT ignored, and what is ignored is inherited
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--output-dir", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    for line in process.stdout:
        if "read MNIST" in line:
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    (line,) = process.stderr.read().splitlines()
    assert process.wait() == 130
    assert line == "main.py: interrupted: the output folder holds what it held before"
    assert saved(output) == {"metrics.json": b"old"}


def test_no_standard_streams_is_no_error(
    small: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as after `>&- 2>&-`
    monkeypatch.setattr(sys, "stderr", None)
    assert main.main(["--lr", "1e20", *SMALL, "--output-dir", str(tmp_path)]) == 1


def test_a_reader_that_leaves_early_is_no_error(output: Path) -> None:
    command = f"{sys.executable} {SCRIPT} --output-dir {output} | head -3; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 141
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 3
