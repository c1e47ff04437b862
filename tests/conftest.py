"""What the tests share: small data, and one whole run of the script as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before torch: its threads, and those of the processes that tests start, sleep while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import main

ROOT = Path(main.__file__).resolve().parent
RESULTS = json.loads((ROOT / "results" / "metrics.json").read_text())


def some(splits, *sizes):
    """The first images of each split, in memory of their own."""
    return [main.Split(x.images[:n].clone(), x.labels[:n].clone()) for x, n in zip(splits, sizes)]


@pytest.fixture(scope="session")
def mnist():
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    return main.load_mnist(ROOT / "data", "cpu")


@pytest.fixture
def small(monkeypatch, mnist):
    """The command line reads a few hundred images, so that a run of all parts takes seconds."""
    splits = some(mnist, 600, 150, 240)
    monkeypatch.setattr(main, "load_mnist", lambda folder, device: splits)
    return splits


@pytest.fixture(scope="session")
def started(mnist, tmp_path_factory):
    """`python main.py > stdout` in another folder, as a cell of a notebook starts it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shown = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        command = [sys.executable, str(ROOT / "main.py")]
        with subprocess.Popen(command, cwd=folder, env=shown, stdout=out, stderr=err) as process:
            yield folder, process


@pytest.fixture(scope="session", autouse=True)
def _start_the_whole_run_first(request):
    """Where a test asks for it, it runs beside the others: together they use both cores."""
    if any("whole_run" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("started")


@pytest.fixture(scope="session")
def whole_run(started):
    folder, process = started
    status = process.wait()
    out, err = ((folder / name).read_text() for name in ("stdout", "stderr"))
    assert status == 0, err
    metrics = json.loads((folder / "outputs" / "metrics.json").read_text())
    return SimpleNamespace(outputs=folder / "outputs", out=out, err=err, metrics=metrics)
