"""MNIST as it is read, turned digits, and archives that are missing or damaged."""

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


def test_only_keeps_the_images_of_one_digit() -> None:
    split = main.Split(torch.arange(8.0).view(4, 2), torch.tensor([9, 1, 9, 0]))
    nines = main.only(split, 9)
    assert nines.images.tolist() == [[0, 1], [4, 5]]
    assert nines.labels.tolist() == [9, 9]


def test_other_digits_are_drawn_by_the_seed_and_each_image_once() -> None:
    labels = torch.tensor([9, 1, 2, 9, 3, 4, 5, 6, 7, 8, 0, 1])
    split = main.Split(torch.arange(12.0).view(12, 1), labels)
    drawn = [main.add_other_digits(split, 9, seed) for seed in (0, 0, 1)]
    for mixed in drawn:
        places = mixed.images.flatten().long()
        assert len(set(places.tolist())) == 2 * (1 + main.OTHERS) == len(places)
        assert torch.equal(mixed.labels, labels[places])
        assert (mixed.labels == 9).sum() == 2
    others = [set(mixed.images.flatten().tolist()) for mixed in drawn]
    assert others[0] == others[1] != others[2]


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


def test_reading_writes_nothing(
    mnist: main.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "there is none"))
    # as an extraction that was killed would leave it
    folder = data_folder(tmp_path / "data", **{"t10k-labels-idx1-ubyte": b"half"})
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    data = main.load_mnist(folder, torch.device("cpu"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert torch.equal(data.test.images, mnist.test.images)
    assert torch.equal(data.test.labels, mnist.test.labels)


@pytest.mark.parametrize("damage", ["none", "cut", "altered"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_is_named(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((RAW / name).read_bytes())
    if damage == "altered":
        content[-9] ^= 1
    folder = data_folder(tmp_path / "data", **{name: content[:-1] if damage == "cut" else content})
    if damage == "none":
        (folder / "MNIST" / "raw" / name).unlink()
    out = tmp_path / "out"
    assert main.main(["--data-dir", str(folder), "--output-dir", str(out)]) == 2
    line = f"main.py: {folder / 'MNIST' / 'raw' / name} is missing or damaged: --data-dir needs it"
    assert capsys.readouterr().err == f"{line} there\n"
    assert not out.exists()  # the data is looked at before folders are made
