"""How fast the script is, on one page: `python tests/benchmark.py [--skip-tutorial]`.

Run by hand; no test asserts a time. It says what share of the machine's own float32 matrix-product
rate the training reaches, how the main job compares with the usual tutorial form of the same, and
what all questions, a further seed and a further epoch cost.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

import main

BATCH = 256  # of the baseline
LAYERS = [(784, 1000), (1000, 2000), (2000, 10)]
PRODUCTS = 3 * len(LAYERS) - 1  # forward, weights, inputs; of the first layer's inputs, none
STEP_FLOPS = sum(2 * BATCH * i * o * (2 if i == 784 else 3) for i, o in LAYERS)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def products() -> Callable[[], None]:
    """The matrix products of one training step, in the order of the step, and nothing else."""
    inputs = [torch.randn(BATCH, i) for i, _ in LAYERS]
    weights = [torch.randn(o, i) for i, o in LAYERS]
    gradients = [torch.randn(BATCH, o) for _, o in LAYERS]

    def step() -> None:
        for x, w in zip(inputs, weights, strict=True):
            x @ w.T
        for layer in reversed(range(len(LAYERS))):
            gradients[layer].T @ inputs[layer]
            if layer:
                gradients[layer] @ weights[layer]

    return step


def share_of_matmul_rate(data: main.Data, rounds: int = 9, steps: int = 25) -> None:
    """Training and bare float32 products in turn, since a machine's speed drifts.

    Where the hardware gains by it, training multiplies in bfloat16: its share can be above 100 %.
    """
    multiply = products()
    part = main.Split(data.train.images[: steps * BATCH], data.train.labels[: steps * BATCH])
    model = main.MNISTClassifier()
    main.train(model, part, 0, "benchmark", lr=2e-3, batch=BATCH)
    pairs = [
        (
            seconds(lambda: [multiply() for _ in range(steps)]) / steps,
            seconds(lambda: main.train(model, part, 0, "benchmark", lr=2e-3, batch=BATCH)) / steps,
        )
        for _ in range(rounds)
    ]
    bare, train = (median(column) for column in zip(*pairs, strict=True))
    share = median(b / t for b, t in pairs)
    rate = f"{STEP_FLOPS / bare / 1e9:8.0f} GFLOP/s"
    print(f"matrix products      {rate}, the {PRODUCTS} of a step in float32")
    print(f"training             {STEP_FLOPS / train / 1e9:8.0f} GFLOP/s")
    print(f"share of that rate   {100 * share:8.0f} %, median of {rounds} pairs")


def epochs(data: main.Data) -> None:
    for n in (1, 8):
        model = main.MNISTClassifier()
        options = {"lr": 2e-3, "epochs": n, "batch": BATCH}
        taken = seconds(lambda m=model, o=options: main.train(m, data.train, 0, "", **o)) / n
        rate = len(data.train.labels) / taken
        print(f"baseline, epochs {n}   {taken:8.2f} s an epoch, {rate:,.0f} images/s")


def whole_command(*options: str) -> float:
    """Wall seconds of `python main.py` with options in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, main.__file__, *options, "--output-dir", folder]
        return seconds(lambda: subprocess.run(command, check=True, capture_output=True))


def tutorial() -> None:
    """The experiment as most tutorials write it, with torch's defaults."""
    normalise = transforms.Normalize((main.MEAN,), (main.STD,))
    transform = transforms.Compose([transforms.ToTensor(), normalise])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(main.Settings().data_dir, folder, dirs_exist_ok=True)
        train = MNIST(folder, train=True, transform=transform, download=True)  # extracts it
        test = MNIST(folder, train=False, transform=transform)
    model = main.MNISTClassifier()

    def fit(loader: DataLoader, steps: int | None = None) -> None:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        criterion = nn.CrossEntropyLoss()
        total = 0.0
        for images, labels in islice(loader, steps):
            optimizer.zero_grad()
            loss = criterion(model(images.view(-1, 784)), labels)
            total += loss.item()
            loss.backward()
            optimizer.step()

    def count_errors() -> int:
        wrong = 0
        with torch.no_grad():
            for images, labels in DataLoader(test, batch_size=10):
                for image, label in zip(model(images.view(-1, 784)), labels, strict=True):
                    wrong += int(torch.argmax(image) != label)
        return wrong

    fit(DataLoader(train, batch_size=10, shuffle=True))
    count_errors()
    main.attach_lora(model, rank=1, alpha=1.0)
    nines = torch.utils.data.Subset(train, (train.targets == 9).nonzero().flatten().tolist())
    fit(DataLoader(nines, batch_size=10, shuffle=True), steps=100)
    count_errors()
    main.set_strength(model, 0)
    count_errors()


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip-tutorial", action="store_true", help="leave out some minutes")
    skip = parser.parse_args().skip_tutorial

    main.make_repeatable()
    data = main.load_mnist(main.Settings().data_dir, torch.device("cpu"))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    share_of_matmul_rate(data)
    epochs(data)
    del data

    print()
    alone = whole_command("--main-job-only")
    whole = whole_command()
    three = whole_command("--seeds", "3")
    print(f"--main-job-only      {alone:8.1f} s with imports")
    print(f"main.py              {whole:8.1f} s with imports")
    print(f"each further seed    {(three - whole) / 2:8.1f} s")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak memory          {peak / 1e9:8.2f} GB")

    if not skip:
        process = multiprocessing.get_context("spawn").Process(target=tutorial)
        process.start()
        slow = seconds(process.join)
        ratio = f"{slow / alone:.1f} times the same with --main-job-only"
        print(f"\ntutorial form        {slow:8.1f} s with imports, {ratio}")


if __name__ == "__main__":
    report()
