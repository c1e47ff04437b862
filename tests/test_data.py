"""Chapter "Data", and what is said of archives that are missing or damaged."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import RAW
from torchvision.datasets import MNIST

import main

ARCHIVES = [name for name, _ in MNIST.resources]


def test_splits_are_the_files_normalised_once(mnist: main.Data) -> None:
    archives = [gzip.decompress((RAW / name).read_bytes()) for name in ARCHIVES]
    train, train_labels, test, test_labels = (
        torch.frombuffer(
            bytearray(content), dtype=torch.uint8, offset=8 if "labels" in name else 16
        )
        for name, content in zip(ARCHIVES, archives, strict=True)
    )
    train, test = train.view(-1, 784), test.view(-1, 784)
    for split, images, labels in (
        (mnist.train, train[:55_000], train_labels[:55_000]),
        (mnist.validation, train[55_000:], train_labels[55_000:]),
        (mnist.test, test, test_labels),
    ):
        assert torch.equal(split.labels, labels.long())
        assert split.images.shape == images.shape
        for rows in (slice(9), slice(-9, None)):
            expected = (images[rows] / 255 - 0.1307) / 0.3081
            torch.testing.assert_close(split.images[rows], expected)
    assert mnist.train.images.mean().item() == pytest.approx(0, abs=0.01)
    assert mnist.train.images.std().item() == pytest.approx(1, abs=0.01)
    assert torch.bincount(mnist.train.labels).tolist() == main.IMAGES


def test_only_keeps_the_images_of_one_digit() -> None:
    split = main.Split(torch.arange(8.0).view(4, 2), torch.tensor([9, 1, 9, 0]))
    nines = split.only(9)
    assert nines.images.tolist() == [[0, 1], [4, 5]]
    assert nines.labels.tolist() == [9, 9]


def test_turn_is_counter_clockwise_on_black_and_leaves_its_input_alone(mnist: main.Data) -> None:
    split = main.Split(mnist.test.images[:9].clone(), mnist.test.labels[:9])
    for quarters in range(5):
        turned = main.turn(split, 90.0 * quarters)
        expected = split.images.view(-1, 28, 28).rot90(quarters, (1, 2)).flatten(1)
        torch.testing.assert_close(turned.images, expected, atol=1e-4, rtol=0)
    assert torch.equal(turned.labels, split.labels)
    corners = main.turn(split, 45).images[:, [0, 27, -28, -1]]
    torch.testing.assert_close(corners, torch.full((9, 4), -0.1307 / 0.3081))
    assert torch.equal(split.images, mnist.test.images[:9])


def data_folder(folder: Path, **replaced: bytes) -> Path:
    """A data folder with the four archives, some of which are replaced."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        (raw / name).symlink_to(RAW / name)
    for name, content in replaced.items():
        (raw / name).unlink(missing_ok=True)
        (raw / name).write_bytes(content)
    return folder


def test_the_archives_are_all_that_is_read_and_nothing_stays_beside_them(
    mnist: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    # as an extraction that was killed would leave it
    folder = data_folder(tmp_path / "data", **{"t10k-labels-idx1-ubyte": b"half"})

    def listed() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    before = listed()
    data = main.load_mnist(folder, torch.device("cpu"))
    assert listed() == before
    assert list((tmp_path / "temporary").iterdir()) == []
    assert torch.equal(data.test.images, mnist.test.images)
    assert torch.equal(data.test.labels, mnist.test.labels)


def test_folders_without_archives(tmp_path: Path, refused) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for folder in (*(tmp_path / name for name in ("empty", "file", "link", "none")), RAW):
        line = f"{folder}/MNIST/raw/train-images-idx3-ubyte.gz is missing or damaged: "
        advice = "--data-dir needs it there"
        assert refused("--data-dir", folder, "--output-dir", tmp_path / "out") == line + advice
    assert list((tmp_path / "out").rglob("*.*")) == []


@pytest.mark.parametrize("damage", ["cut", "altered"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_is_named(name: str, damage: str, tmp_path: Path, refused) -> None:
    content = bytearray((RAW / name).read_bytes())
    if damage == "cut":
        del content[-1]
    else:
        content[-9] ^= 1
    folder = data_folder(tmp_path / "data", **{name: content})
    line = refused("--data-dir", folder, "--output-dir", tmp_path / "out")
    assert line.startswith(f"{folder / 'MNIST' / 'raw' / name} is missing or damaged: --data-dir ")
