"""What the tests share: small data, and one whole run of the script as a user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

# Before torch: its threads, and those of the processes that tests start, sleep while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import main

SCRIPT = Path(main.__file__).resolve()
RAW = main.Settings().data_dir / "MNIST" / "raw"


def named(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The only row of a name, "task/method"."""
    (row,) = [row for row in rows if f"{row['task']}/{row['method']}" == name]
    return row


@pytest.fixture(scope="session")
def mnist() -> main.Data:
    main.make_repeatable()
    return main.load_mnist(main.Settings().data_dir, torch.device("cpu"))


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`python /path/to/main.py > stdout` in another folder, with no display."""
    folder = tmp_path_factory.mktemp("elsewhere")
    hidden = ("MPLBACKEND", "DISPLAY", "WAYLAND_DISPLAY")
    shown = {key: value for key, value in os.environ.items() if key not in hidden}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        command = [sys.executable, str(SCRIPT)]
        with subprocess.Popen(command, cwd=folder, env=shown, stdout=out, stderr=err) as process:
            yield folder, process


@pytest.fixture(scope="session", autouse=True)
def _start_the_whole_run_first(request: pytest.FixtureRequest) -> None:
    """Where a test asks for it, it runs beside the others: together they use both cores."""
    if any("whole_run" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("started")


@pytest.fixture(scope="session")
def whole_run(started: Any) -> SimpleNamespace:
    folder, process = started
    status = process.wait()
    # as bytes first, which keeps its \r, if there is any
    out, err = ((folder / name).read_bytes().decode() for name in ("stdout", "stderr"))
    assert status == 0, err
    assert {path.name for path in folder.iterdir()} == {"stdout", "stderr", "outputs"}
    metrics = json.loads((folder / "outputs" / "metrics.json").read_text())
    outputs, rows = folder / "outputs", metrics["rows"]
    return SimpleNamespace(outputs=outputs, stdout=out, stderr=err, rows=rows)


def first_images(data: main.Data, train: int, validation: int, test: int) -> main.Data:
    """The first images of each split, in memory of their own."""
    sizes = zip(data, (train, validation, test), strict=True)
    return main.Data(*(main.Split(x.images[:n].clone(), x.labels[:n].clone()) for x, n in sizes))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, mnist: main.Data) -> main.Data:
    """The command line reads a few hundred images of MNIST, so that a whole run takes seconds."""
    data = first_images(mnist, 600, 150, 240)
    monkeypatch.setattr(main, "load_mnist", lambda folder, device: data)
    return data
