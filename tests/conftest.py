"""What the tests share: the data, the published results, and one whole run beside the others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads sleep while they wait
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `pytest` finds main.py, from wherever it is called

import main

SOURCE, README = (ROOT.joinpath(x).read_text(encoding="utf-8") for x in ("main.py", "README.md"))
RESULTS = json.loads((ROOT / "results" / "metrics.json").read_text())
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


def some(splits, *sizes):
    """The first images of each split."""
    return [split.some(slice(size)) for split, size in zip(splits, sizes)]


@pytest.fixture(scope="session")
def mnist():
    return main.load_mnist(ROOT / "data", "cpu")


@pytest.fixture
def small(monkeypatch, mnist):
    """The command line reads a few hundred images."""
    monkeypatch.setattr(main, "load_mnist", lambda *_: some(mnist, 600, 150, 240))


@pytest.fixture(scope="session", autouse=True)
def started(request, tmp_path_factory, mnist):
    """`python main.py`, which runs while other tests do, when `mnist` has been unpacked."""
    if any("whole_run" in item.fixturenames for item in request.session.items):
        folder = tmp_path_factory.mktemp("elsewhere")
        command = [sys.executable, "-W", "error", ROOT / "main.py"]
        return folder, subprocess.Popen(command, cwd=folder, **PIPES)
