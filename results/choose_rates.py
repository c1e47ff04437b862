"""Try the grids that the constants for the 9 were chosen from: `python results/choose_rates.py`.

Run by hand: it takes some ten minutes and writes results/rates.json, a row for each seed, method
and setting tried, all on the 5,000 validation images. results/README.md states the rules.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch

import main

LORA = [1e-3, 1.2e-3, 1.3e-3, 1.4e-3, 1.5e-3, 1.6e-3]
FULL = [2e-5, 3e-5, 4e-5, 5e-5, 6e-5, 7e-5]
OTHERS = [1, 3, 9]


def try_all(seed, splits):
    """The rows of one seed, from the functions of main.py with validation in place of test."""
    training, validation, _ = splits
    job = main.main_job(main.PARSER.parse_args([]), seed, [training, validation, validation])
    yield main.score(job, "baseline", job.before, 0)
    torch.manual_seed(seed)
    main.MNISTClassifier()  # draws again what main_job drew before it drew LoRA
    lora = main.attach_lora(deepcopy(job.baseline), job.rank, job.alpha)
    for method, start, rates in (("LoRA", lora, LORA), ("full fine-tuning", job.baseline, FULL)):
        for lr in rates:
            model = deepcopy(start)
            main.train(model, job.own, seed, method, lr)
            logits = main.evaluate(model, validation)
            yield main.score(job, method, logits, main.count_trained(model)) | {"lr": lr}
    for main.OTHERS in OTHERS:
        *_, row = main.measure_cost(job)  # LoRA + other digits comes last
        yield row | {"others": main.OTHERS}


if __name__ == "__main__":
    splits = main.load_mnist(HERE.parent / "data", "cpu")
    rows = [{"seed": seed, **row} for seed in range(5) for row in try_all(seed, splits)]
    (HERE / "rates.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
