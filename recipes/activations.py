"""Look inside a teacher that is fed noise: Figs. 2 and 4 of Raikwar & Mishra (NeurIPS 2022).

    python recipes/activations.py --teacher runs/cifar10/teacher
    accelerate launch recipes/activations.py --preset paper         # the authors' networks, for a GPU

A batch of test images and a batch of white noise go through the teacher, with its BatchNorm layers on their running
statistics and on those of the batch. hidden.png shows what the layers normalise to (Fig. 2), pooled.png the activations
after average pooling (Fig. 4), of 2,048 images or noise images in batches of 256. Without `--teacher` one is trained
first.
"""

import torch
from accelerate import PartialState
from harness.activations import HIDDEN_EDGES, hidden_activations, pooled_features
from harness.experiment import Experiment, experiment_parser
from harness.figures import Panel, plot_panels
from harness.presets import CIFAR10
from harness.results import Results

from hf_noisekd import NoiseDataset

BATCHES, BATCH_SIZE = 8, 256
# By the name of its line: whether it is noise, and the statistics of the teacher.
INPUTS = {
    "images, running statistics": (False, "running"),
    "noise, running statistics": (True, "running"),
    "noise, batch statistics": (True, "batch"),
}


def main() -> None:
    """Measure the activations, draw both figures and print the tables."""
    options = experiment_parser(__doc__, "activations", CIFAR10).parse_args()
    experiment = Experiment("activations", options, CIFAR10[options.preset])
    teacher = experiment.prepare_teacher()
    device = next(teacher.parameters()).device
    size = min(BATCH_SIZE, len(experiment.test_dataset))
    count = min(BATCHES, len(experiment.test_dataset) // size)
    images = experiment.test_dataset.subset(count * size, options.seed)
    images = [images.__getitems__(batch)["pixel_values"].to(device) for batch in torch.arange(count * size).split(size)]
    noise = NoiseDataset.for_model(
        teacher, batch_size=size, num_steps=count, seed=options.seed, held_out=True, device=device
    )
    noise = [batch["pixel_values"] for batch in noise]
    hidden, pooled = {}, {}
    for name, (is_noise, statistics) in INPUTS.items():
        inputs = noise if is_noise else images
        hidden[name] = hidden_activations(teacher, inputs[0], statistics)
        answers = [pooled_features(teacher, pixel_values, statistics) for pixel_values in inputs]
        pooled[name] = [torch.cat(parts).float().cpu() for parts in zip(*answers, strict=True)]
    if PartialState().is_main_process:
        report_hidden(experiment.results, hidden)
        report_pooled(experiment.results, pooled)
    experiment.results.print_table()


def report_hidden(results: Results, hidden: dict[str, list[dict]]) -> None:
    """Record and draw what the BatchNorm layers normalise to."""
    names = [layer["layer"] for layer in next(iter(hidden.values()))]
    rows = [{"layer": layer} for layer in names]
    for key in ("mean", "std", "density"):
        for name, layers in hidden.items():
            for row, layer in zip(rows, layers, strict=True):
                row[f"{key}: {name}"] = layer[key]
    results.measure("hidden activations", rows)
    panels = [
        Panel(
            {name: density_points(HIDDEN_EDGES, layers[index]["density"]) for name, layers in hidden.items()},
            title=names[index],
            xlabel="normalised activation",
            marker=False,
        )
        for index in (0, len(names) // 2, len(names) - 1)
    ]
    panels[0].ylabel = "density"
    spread = {name: [(index + 1, layer["std"]) for index, layer in enumerate(hidden[name])] for name in hidden}
    panels.append(Panel(spread, "all layers", "BatchNorm layer", "standard deviation of a channel"))
    plot_panels(panels, results.output_dir / "hidden.png")


def report_pooled(results: Results, pooled: dict[str, list[torch.Tensor]]) -> None:
    """Record and draw the activations after average pooling, and what the teacher answers."""
    of_images = next(iter(pooled.values()))[0].flatten().sort().values
    bounds = [bound.item() for features, _ in pooled.values() for bound in features.aminmax()]
    edges = torch.linspace(min(bounds), max(bounds), 81)
    rows = []
    for name, (features, logits) in pooled.items():
        values = features.flatten().sort().values
        density = torch.histogram(values, edges).hist / (len(values) * edges.diff())
        rows.append(
            {
                "input": name,
                "mean": values.mean().item(),
                "standard deviation": values.std().item(),
                "Wasserstein distance from the images": (values - of_images).abs().mean().item(),
                "most frequent answer (%)": 100 * logits.argmax(1).bincount().max().item() / len(logits),
                "edges": [round(edge, 4) for edge in edges.tolist()],
                "density": [round(value, 6) for value in density.tolist()],
            }
        )
    results.measure("pooled activations", rows)
    lines = {row["input"]: density_points(edges, row["density"]) for row in rows}
    panel = Panel(lines, xlabel="activation after average pooling", ylabel="density", log_y=True, marker=False)
    plot_panels([panel], results.output_dir / "pooled.png")


def density_points(edges: torch.Tensor, density: list[float]) -> list[tuple[float, float]]:
    """Return the middles of the bins with their densities; empty bins are left out."""
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    return [(middle, value) for middle, value in zip(middles, density, strict=True) if value > 0]


if __name__ == "__main__":
    main()
