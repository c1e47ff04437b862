"""What the tests share: small data, and one whole run of the script as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Before torch: its threads, and those of the processes that tests start, sleep while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import main

SCRIPT = Path(main.__file__).resolve()
RAW = main.Settings().data_dir / "MNIST" / "raw"


@dataclass(frozen=True)
class WholeRun:
    folder: Path  # the current folder of the run, with its outputs
    stdout: str
    stderr: str
    metrics: dict[str, Any]
    data_before: dict[str, tuple[int, int]]  # of each file of data/: size and time of change
    data_after: dict[str, tuple[int, int]]

    def row(self, name: str) -> dict[str, Any]:
        return named(self.metrics["rows"], name)


def named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The only row of a name, "task/method"."""
    (row,) = [row for row in rows if f"{row['task']}/{row['method']}" == name]
    return row


def data_files() -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in RAW.iterdir()}


@pytest.fixture(scope="session")
def mnist() -> main.Data:
    main.make_repeatable()
    return main.load_mnist(main.Settings().data_dir, torch.device("cpu"))


Started = tuple[Path, subprocess.Popen[bytes], dict[str, tuple[int, int]]]


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """`python /path/to/main.py > log` in another folder, with no display."""
    folder = tmp_path_factory.mktemp("elsewhere")
    hidden = ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    before = data_files()
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.PIPE,
        ) as process,
    ):
        yield folder, process, before


@pytest.fixture(scope="session", autouse=True)
def _start_the_whole_run_first(request: pytest.FixtureRequest) -> None:
    """Where a test asks for it, it runs beside the others: together they use both cores."""
    if any("whole_run" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("started")


@pytest.fixture(scope="session")
def whole_run(started: Started) -> WholeRun:
    folder, process, before = started
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return WholeRun(
        folder=folder,
        stdout=(folder / "log").read_bytes().decode(),  # with its \r, if there is any
        stderr=errors.decode(),
        metrics=json.loads((folder / "outputs" / "metrics.json").read_text()),
        data_before=before,
        data_after=data_files(),
    )


def first_images(data: main.Data, train: int, validation: int, test: int) -> main.Data:
    """The first images of each split, in memory of their own."""
    sizes = zip((data.train, data.validation, data.test), (train, validation, test), strict=True)
    return main.Data(*(main.Split(x.images[:n].clone(), x.labels[:n].clone()) for x, n in sizes))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, mnist: main.Data) -> main.Data:
    """The command line reads a few hundred images of MNIST, so that a whole run takes seconds."""
    data = first_images(mnist, 600, 150, 240)
    monkeypatch.setattr(main, "load_mnist", lambda folder, device: data)
    return data
