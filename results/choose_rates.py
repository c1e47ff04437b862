"""Try the grids that main.py's constants were chosen from: `python results/choose_rates.py`.

Run by hand: it takes some ten minutes and writes results/rates.json, a row for each seed, method
and setting tried. All but the rows of the task "draws" are scores on the 5,000 validation images.
results/README.md states the rules; tests/test_readme.py holds them to the file.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import main

SEEDS = range(5)
DIGIT = {
    "lora": [1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1.5e-3, 1.6e-3],
    "full": [2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5],
}
OTHERS = [1, 3, 9]
NEW_DATA = {
    "biases": [0.1, 0.3, 1.0, 3.0],
    "lora_rank1": [1e-2, 2e-2, 3e-2, 4e-2, 6e-2],
    "lora_rank2": [1e-2, 1.5e-2, 2e-2, 3e-2, 4e-2],
    "lora_rank4": [1e-2, 1.5e-2, 2e-2, 3e-2],
    "lora_rank8": [5e-3, 1e-2, 1.5e-2, 2e-2, 3e-2],
    "lora_rank16": [5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2],
    "full": [5e-4, 6e-4, 7e-4, 8e-4, 1e-3, 1.5e-3, 2e-3, 3e-3],
}


def likeness(job: main.Job, images: torch.Tensor) -> float:
    """How far what training added to lora_A of the first layer looks like the mean of images."""
    start, lora = (
        main.lora_layers(model)["linear1"].lora_A[0].data for model in (job.start, job.lora)
    )
    pair = torch.stack([lora - start, images.mean(0)])
    return float(torch.corrcoef(pair)[0, 1].abs())


def rank1_share(matrix: torch.Tensor) -> float:
    """The share of a matrix, in squares, that its nearest matrix of rank 1 holds."""
    return float(torch.linalg.matrix_norm(matrix, 2) / matrix.norm()) ** 2


def try_all(seed: int, data: main.Data) -> list[dict[str, Any]]:
    """All rows of one seed, from the functions of main.py with validation in place of test."""
    settings = main.Settings()
    job = main.main_job(settings, seed, data._replace(test=data.validation))
    rows = [job.rows[0]]

    def add(method: str, model: main.Model, **more: Any) -> None:
        logits = main.evaluate(model, data.validation)
        rows.append(main.score(f"digit/{method}", logits, data.validation, job.digit, **more))

    for lr in DIGIT["lora"]:
        lora = deepcopy(job.start)
        main.train(lora, job.images, seed, "LoRA", lr=lr)
        add("lora", lora, lr=lr)
    for lr in DIGIT["full"]:
        full = deepcopy(job.baseline)
        main.train(full, job.images, seed, "full", lr=lr)
        add("full", full, lr=lr)
        if lr == main.FULL_LR:
            layers = [(main.weight(job.baseline, x), main.weight(full, x)) for x in main.LAYERS]
            rows[-1]["change_in_rank1"] = [rank1_share(after - before) for before, after in layers]
            rows[-1]["weights_in_rank1"] = [rank1_share(before) for before, _ in layers]
    for others in OTHERS:
        main.OTHERS = others
        lora = deepcopy(job.start)
        mixed = main.add_other_digits(data.train, job.digit, seed)
        batch = 128 * (1 + others)
        main.train(lora, mixed, seed, "LoRA + other digits", settings.lora_lr, batch=batch)
        add("lora_replay", lora, others=others)

    few, turned = (main.turn(x, settings.angle) for x in (data.train[:5000], data.validation))
    models = {"full": job.baseline, "new_lora": job.lora, "new_full": job.baseline}  # not used
    tuned = main.Tuned(**vars(job), turned=few, turned_test=turned, **models)
    for method, grid in NEW_DATA.items():
        for lr in grid:
            model = deepcopy(job.baseline)
            if method == "biases":
                model.requires_grad_(False).get_parameter("linear3.bias").requires_grad_()
            elif method != "full":
                model = main.fresh_lora(job, int(method.removeprefix("lora_rank")))
            main.NEW_DATA_LR[method] = lr
            rows.append(main.learn_turned(tuned, method, model) | {"lr": lr})

    # What is left to chance: LoRA of one baseline, from several draws of lora_A, on test images.
    for draw in range(5):
        torch.manual_seed(1000 + draw)
        lora = main.attach_lora(deepcopy(job.baseline), settings.rank, settings.alpha)
        main.train(lora, job.images, seed, "LoRA, another draw", lr=settings.lora_lr)
        logits = main.evaluate(lora, data.test)
        rows.append(main.score("draws/lora", logits, data.test, job.digit, draw=draw))
    own, every = (likeness(job, x.images) for x in (job.images, data.train))
    row = {"task": "draws", "method": "lora_A", "likeness": own, "likeness_all_digits": every}
    rows.append(row)
    return [{"seed": seed, **found} for found in rows]


def write() -> None:
    main.make_repeatable()
    data = main.load_mnist(main.Settings().data_dir, torch.device("cpu"))
    rows = []
    for seed in SEEDS:
        rows += try_all(seed, data)
        print(f"seed {seed}: {len(rows)} rows")
    lines = ",\n".join(json.dumps(row) for row in rows)
    place = Path(__file__).resolve().with_name("rates.json")
    place.write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write()
