"""Try the grids that main.py's constants were chosen from: `python results/choose_rates.py`.

Run by hand: it takes some ten minutes and writes results/rates.json, a row for each seed, method
and setting tried, all on the 5,000 validation images. results/README.md states the rules.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main

LORA = [1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1.5e-3, 1.6e-3]
FULL = [2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5]
OTHERS = [1, 3, 9]
TASKS = [5e-4, 7e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2, 3e-2]


def try_all(seed, splits):
    """The rows of one seed, from the functions of main.py with validation in place of test."""
    training, validation, _ = splits
    job = main.main_job(main.PARSER.parse_args([]), seed, [training, validation, validation])
    yield job.score("baseline", job.before, main.count_trained(job.baseline))
    for method, start, rates in (
        ("LoRA", job.start, LORA),
        ("full fine-tuning", job.baseline, FULL),
    ):
        for lr in rates:
            model = deepcopy(start)
            main.train(model, job.own, seed, method, lr)
            logits = main.evaluate(model, validation.images)
            yield job.score(method, logits, main.count_trained(model)) | {"lr": lr}
    for others in OTHERS:
        main.OTHERS = others
        *_, row = main.measure_cost(job)  # LoRA + other digits comes last
        yield row | {"others": others}
    ways = main.ways
    for lr in TASKS:
        main.ways = lambda x, lr=lr: [(name, model, lr, steps) for name, model, _, steps in ways(x)]
        for row in main.measure_tasks(job):
            yield row | {"lr": lr}
    main.ways = ways


def write():
    torch.set_flush_denormal(True)
    splits = main.load_mnist(Path(main.__file__).resolve().parent / "data", "cpu")
    lines = []
    for seed in range(5):
        for row in try_all(seed, splits):
            row.pop("errors", None)
            if row["method"] != "baseline" or "lr" not in row:  # which no rate changes
                lines.append(json.dumps({"seed": seed, **row}))
    text = ",\n".join(lines)
    Path(__file__).resolve().with_name("rates.json").write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    write()
