"""See why batch statistics work, in the plane: Fig. 3 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/circles.py    # a minute on a CPU

A small network with BatchNorm1d learns to tell scikit-learn's two circles apart; the activations before its classifier
are two numbers, the embedding. Gaussian noise in the plane has other statistics in each layer: read with running
statistics its embeddings drift away from those of the data, read with the statistics of the batch they come back. Then
two students learn from the predictions, as in the other recipes. In the plane even noise that drifts covers both
circles, so both students learn them; they differ in the statistics with which they can be read.
"""

from itertools import pairwise

import torch
from accelerate import PartialState
from harness.figures import plot_embeddings
from harness.presets import ROWS
from harness.results import Results, recipe_parser
from sklearn.datasets import make_circles
from torch import nn
from torch.utils.data import TensorDataset

from hf_noisekd import (
    ClassifierConfig,
    ClassifierTrainer,
    NoiseDataset,
    NoiseKDConfig,
    NoiseKDTrainer,
    batch_statistics,
)

PRESETS = {"cpu": {"width": 64, "layers": 3, "noise": 0.05, "factor": 0.5, "teacher_steps": 500, "noise_steps": 2000}}


def main() -> None:
    """Train the teacher, draw the embeddings, and train two students."""
    options = recipe_parser(__doc__, "circles", PRESETS).parse_args()
    preset = PRESETS[options.preset]
    results = Results("circles", options, preset)

    def data(seed: int) -> TensorDataset:
        points, labels = make_circles(2048, noise=preset["noise"], factor=preset["factor"], random_state=seed)
        points = torch.from_numpy(points).float()
        return TensorDataset(points.view(-1, 2, 1, 1), torch.from_numpy(labels))

    train_dataset, test_dataset = data(options.seed), data(options.seed + 1000)
    test_dataset.name = "two circles"

    def build() -> nn.Sequential:
        torch.manual_seed(options.seed)
        widths = [2] + [preset["width"]] * preset["layers"] + [2]
        hidden = [
            module
            for inputs, outputs in pairwise(widths)
            for module in (nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())
        ]
        return nn.Sequential(nn.Flatten(), *hidden[:-1], nn.Linear(2, 2))  # no ReLU on the embedding

    def arguments(name: str, steps: int) -> dict:
        steps = min(steps, options.max_steps or steps)
        shared = {"max_steps": steps, "seed": options.seed, "bf16": False, "save_strategy": "no"}
        return {"output_dir": options.output_dir / name, "learning_rate": 1e-2, **shared}

    args = ClassifierConfig(**arguments("teacher", preset["teacher_steps"]))
    trainer = ClassifierTrainer(build(), args, train_dataset=train_dataset, eval_dataset=test_dataset)
    teacher = results.train("teacher", trainer).eval()
    if PartialState().is_main_process:
        report_embeddings(results, teacher, test_dataset.tensors[0], options.seed)
    for row, fraction in (("noise-running", 0.0), ("noise-batch", 1.0)):
        args = NoiseKDConfig(
            **arguments("student", preset["noise_steps"]),
            noise="white",
            loss_type="soft_cross_entropy",
            temperature=1.0,
            lr_scheduler_type="cosine",
            batch_norm_fraction=fraction,
            input_size=[2, 1, 1],
            num_calibration_images=0,
        )
        results.train(ROWS[row], NoiseKDTrainer(build(), teacher, args, eval_dataset=test_dataset))
    results.print_table()


def report_embeddings(results: Results, teacher: nn.Sequential, data: torch.Tensor, seed: int) -> None:
    """Record and draw the embeddings of the data and of as many noise points."""
    noise = NoiseDataset((2, 1, 1), len(data), seed=seed, held_out=True).draw(0)
    embeddings, rows = {}, []
    for name, points, on_batch in (
        ("data, running statistics", data, False),
        ("noise, running statistics", noise, False),
        ("noise, batch statistics", noise, True),
    ):
        with torch.no_grad(), batch_statistics(teacher, fraction=float(on_batch)):
            embedding = teacher[:-1](points.to(next(teacher.parameters()).device))
            answers = teacher[-1](embedding).argmax(1)
        embeddings[name] = (embedding.cpu().numpy(), answers.cpu().numpy())
        rows.append(
            {
                "input": name,
                "mean of the embedding": embedding.mean(0).norm().item(),
                "standard deviation": embedding.std(0).mean().item(),
                "answered the inner circle (%)": 100 * answers.float().mean().item(),
            }
        )
    results.measure("embeddings", rows)
    plot_embeddings(embeddings, results.output_dir / "embeddings.png")


if __name__ == "__main__":
    main()
