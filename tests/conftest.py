"""What the tests share: the published results, the data, and a script that runs in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads sleep while they wait

import main

ROOT = Path(main.__file__).resolve().parent
README = (ROOT / "README.md").read_text()
RESULTS = json.loads((ROOT / "results" / "metrics.json").read_text())
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def some(splits, *sizes):
    """The first images of each split."""
    return [split.some(slice(size)) for split, size in zip(splits, sizes)]


@pytest.fixture(scope="session")
def mnist():
    return main.load_mnist(ROOT / "data", "cpu")


@pytest.fixture
def small(monkeypatch, mnist):
    """The command line reads a few hundred images, from any folder that exists."""
    splits = some(mnist, 600, 150, 240)
    monkeypatch.setattr(main, "load_mnist", lambda folder, _: folder.exists() and splits)
    return splits


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory):
    """`python main.py`, as a cell of a notebook starts it: it runs while other tests do."""
    if not any("whole_run" in item.fixturenames for item in request.session.items):
        return None
    folder = tmp_path_factory.mktemp("elsewhere")
    shown = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, ROOT / "main.py"]
    return folder, subprocess.Popen(command, cwd=folder, env=shown, **PIPES)
