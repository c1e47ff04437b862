"""MNIST as it is read, turned digits, and archives that are missing or damaged."""

import gzip
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import RAW
from torchvision.datasets import MNIST

import main

ARCHIVES = [name for name, _ in MNIST.resources]


def test_splits_are_the_files_normalised_once_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = shutil.copytree(RAW, tmp_path / "data" / "MNIST" / "raw")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is none"))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"half")  # an extraction that was killed
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = main.load_mnist(tmp_path / "data", torch.device("cpu"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    files = [bytearray(gzip.decompress((RAW / name).read_bytes())) for name in ARCHIVES]
    train, train_labels, test, test_labels = [torch.frombuffer(x, dtype=torch.uint8) for x in files]
    labels = torch.cat([train_labels[8:], test_labels[8:]]).long()
    images = torch.cat([train[16:], test[16:]]).view(-1, 784)[::1000]
    assert [len(split.images) for split in data] == [55_000, 5_000, 10_000]
    assert torch.equal(torch.cat([split.labels for split in data]), labels)
    found = torch.cat([split.images[::1000] for split in data])
    torch.testing.assert_close(found, (images / 255 - 0.1307) / 0.3081)


def test_turn_is_counter_clockwise_on_black_and_leaves_its_input_alone() -> None:
    images, labels = torch.rand(9, 784), torch.arange(9)
    split = main.Split(images.clone(), labels)
    quarter, eighth = main.turn(split, 90), main.turn(split, 45)
    expected = images.view(-1, 28, 28).rot90(1, (1, 2)).flatten(1)
    torch.testing.assert_close(quarter.images, expected, atol=1e-4, rtol=0)
    corners = eighth.images[:, [0, 27, -28, -1]]
    torch.testing.assert_close(corners, torch.full((9, 4), -0.1307 / 0.3081))
    assert torch.equal(quarter.labels, labels) and torch.equal(split.images, images)


def test_a_missing_or_damaged_archive_is_named_before_a_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = shutil.copytree(RAW, tmp_path / "data" / "MNIST" / "raw")
    options = [f"--data-dir={tmp_path / 'data'}", f"--output-dir={tmp_path / 'out'}"]
    damage = [b"altered", b"altered", b"cut", b""]
    for name, end in zip(reversed(ARCHIVES), damage, strict=True):  # the one read first comes last
        (raw / name).write_bytes((raw / name).read_bytes()[:-7] + end)
        if not end:
            (raw / name).unlink()
        assert main.main(options) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{raw / name} is missing or damaged" in line
    assert not (tmp_path / "out").exists()
