"""What the tests share: the data, the published results, and one whole run beside the others."""

import gc
import json
import os
import re
import sys
from pathlib import Path
from statistics import fmean, stdev
from subprocess import PIPE, Popen

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads sleep while they wait
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that `pytest` finds main.py, from wherever it is called

import main

# its import leaves the importer's objects and backend alone
assert not gc.get_freeze_count() and "matplotlib.pyplot" not in sys.modules

SOURCE, README = (ROOT.joinpath(x).read_text(encoding="utf-8") for x in ("main.py", "README.md"))
*LESSON, LOADING = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
RESULTS = json.loads((ROOT / "results" / "metrics.json").read_text())


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


def published(method, metric="accuracy", task=None):
    """A metric of a method (on a task) in each of the 20 published seeds."""
    rows = [x for x in RESULTS["rows"] if (x["method"], x.get("task")) == (method, task)]
    assert len(rows) == 20
    return [row[metric] for row in rows]


def told(method, metric, decimals, task=None):
    """Its mean and its deviation, as text."""
    found = published(method, metric, task)
    return f"{fmean(found):,.{decimals}f}", f"{stdev(found):.{decimals}f}"


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
        return folder, Popen(command, cwd=folder, stdout=PIPE, stderr=PIPE, text=True)
