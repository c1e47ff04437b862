"""Chapter "Data", and what is said of files that are missing or damaged."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import RAW
from torchvision.datasets import MNIST

import main

ARCHIVES = [name for name, _ in MNIST.resources]


def test_splits_are_the_files_normalised_once(mnist: main.Data) -> None:
    assert [len(s.labels) for s in (mnist.train, mnist.validation, mnist.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    assert mnist.train.images.shape == (55_000, 784)
    assert mnist.train.images.dtype == torch.float32
    raw = MNIST(main.DATA_DIR, train=True)
    for split, rows in ((mnist.train, slice(0, 3)), (mnist.validation, slice(55_000, 55_003))):
        expected = (raw.data[rows].flatten(1) / 255 - 0.1307) / 0.3081
        torch.testing.assert_close(split.images[:3], expected)
        assert split.labels[:3].tolist() == raw.targets[rows].tolist()
    test = MNIST(main.DATA_DIR, train=False)
    assert torch.equal(mnist.test.labels, test.targets)
    assert abs(mnist.train.images.mean()) < 0.01
    assert abs(mnist.train.images.std() - 1) < 0.01


def test_only_keeps_the_images_of_one_digit() -> None:
    split = main.Split(torch.arange(8.0).view(4, 2), torch.tensor([9, 1, 9, 0]))
    nines = split.only(9)
    assert nines.images.tolist() == [[0, 1], [4, 5]]
    assert nines.labels.tolist() == [9, 9]


def test_pixels_undoes_the_normalisation(mnist: main.Data) -> None:
    image = main.pixels(mnist.test.images[0])
    raw = MNIST(main.DATA_DIR, train=False).data[0] / 255
    torch.testing.assert_close(image, raw, atol=1e-6, rtol=0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, on a machine without a network."""
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    return tmp_path / "data"


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which the command line refuses this data folder."""
    output = folder.parent / "outputs"
    assert main.main(["--data-dir", str(folder), "--output-dir", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not list(output.glob("*.*"))
    return line


def test_no_archives_and_no_network(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = run(folder, capsys)
    assert str(folder / "MNIST" / "raw") in line
    assert all(f"{name} is missing" in line for name in ARCHIVES)


def test_an_error_of_http_is_as_no_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:none/"])  # as of a proxy that is wrong
    assert f"{ARCHIVES[0]} is missing" in run(folder, capsys)


def test_a_data_folder_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").touch()
    line = run(tmp_path / "data", capsys)
    assert f"--data-dir {tmp_path / 'data'}: {tmp_path / 'data'}" in line
    assert "give another folder" in line


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_damaged_archive(damage: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = folder / "MNIST" / "raw"
    for name in ARCHIVES:
        shutil.copy(RAW / name, raw)
    path = raw / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    else:
        content[1000] ^= 1
    path.write_bytes(content)
    line = run(folder, capsys)
    assert "t10k-images-idx3-ubyte.gz is damaged" in line
    assert "train-images-idx3-ubyte.gz is" not in line


@pytest.mark.parametrize("damage", ["cut", "another kind"])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_damaged_extracted_file(
    name: str, damage: str, folder: Path, mnist: main.Data, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = folder / "MNIST" / "raw"
    for other in main.EXTRACTED:
        os.symlink(RAW / other, raw / other)
    (raw / name).unlink()
    if damage == "cut":
        (raw / name).write_bytes((RAW / name).read_bytes()[:5000])
    else:
        shutil.copy(RAW / "train-labels-idx1-ubyte", raw / name)
    line = run(folder, capsys)
    assert f"{raw / name} is damaged: delete it" in line


def test_extracted_files_need_no_archives_and_no_right_to_write(mnist: main.Data) -> None:
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folder is closed to others
        raw = Path(temporary) / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for name in main.EXTRACTED:
            shutil.copy(RAW / name, raw)
            (raw / name).chmod(0o444)
        for folder in (raw, raw.parent, raw.parent.parent):
            folder.chmod(0o555)
        user = os.geteuid()
        try:
            if user == 0:  # whom no permission stops
                os.seteuid(65534)
            with pytest.raises(PermissionError):
                (raw / "new").touch()
            data = main.read_data(Path(temporary), torch.device("cpu"))
        finally:
            os.seteuid(user)
            for folder in (raw.parent.parent, raw.parent, raw):
                folder.chmod(0o755)
    assert torch.equal(data.test.images, mnist.test.images)


def test_a_batch_larger_than_its_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, images in (
        (["--batch-size", "55001"], "55000"),
        (["--lora-batch-size", "5500"], "5466"),
    ):
        assert main.main([*arguments, "--output-dir", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert " ".join(arguments) in line
        assert images in line
