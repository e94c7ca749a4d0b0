"""Compare noises at equal steps and at equal seconds, and with what a teacher says of them without data.

    python recipes/noise_distributions.py --teacher runs/cifar10/teacher

Beyond the paper. Students are trained on each noise at full size, for 500 steps and for as many as fit into the
seconds of 500 steps of white noise. The cost of a step is measured beforehand, relative to white noise; where it is the
same within 2 %, one run is both. Distance, class balance and information are what the teacher tells of a noise without
any image, and the rank correlation (Spearman's, 1: alike, -1: reversed) says how that goes with the accuracy at equal
seconds, for all noises and for those without dead leaves. `--preset cpu-wrn` has another teacher, a WRN-16-2.
"""

from collections.abc import Iterable, Mapping

from harness.equal_seconds import distill_twice, step_cost
from harness.experiment import Experiment, experiment_parser
from harness.figures import ACCURACY_LABEL, Panel, plot_contact_sheet, plot_panels
from harness.noise_fit import noise_fit
from harness.noises import noise_of
from harness.presets import NOISE_PAIRS
from scipy.stats import spearmanr

from hf_noisekd import NoiseDataset

NOISES = (
    "white",
    "low_resolution(2)",
    "low_resolution(4)",
    "low_resolution(8)",
    "spectrum",
    "pyramid",
    "fractal",
    "dead_leaves(3)",
    "dead_leaves",
    "dead_leaves|cutmix:0.5",
    "dead_leaves|mixup:0.5",
    "dead_leaves,fractal,spectrum",
)
STEPS = 500
CRITERIA = ("distance", "class_balance", "information")


def main() -> None:
    """Train the students, measure the noises, and print their tables."""
    parser = experiment_parser(__doc__, "noise_distributions", NOISE_PAIRS, resumes=True)
    parser.add_argument("--noises", nargs="+", default=NOISES, help="noises to compare, the first for the seconds")
    options = parser.parse_args()
    experiment = Experiment("noise_distributions", options, NOISE_PAIRS[options.preset])
    results, teacher = experiment.results, experiment.prepare_teacher()
    fits = [noise_fit(teacher, noise_of(row), seed=options.seed) | {"noise": row} for row in options.noises]
    results.measure("what the teacher says", sorted(fits, key=lambda fit: fit["distance"]))
    arguments = {row: {"noise": noise_of(row), "resolutions": "1"} for row in options.noises}
    costs = step_cost(experiment, arguments)
    rows = []
    for noise, changed in arguments.items():
        row = distill_twice(experiment, noise, STEPS, round(STEPS / costs[noise]), **changed)
        rows.append({"noise": noise} | row | {"cost of a step": costs[noise]})
        results.measure("accuracy", rows)
    fit_of = {fit["noise"]: fit for fit in fits}
    accuracy_of = {row["noise"]: row["accuracy, equal seconds"] for row in rows}
    others = [noise for noise in arguments if "dead_leaves" not in noise]
    correlations = [
        {"of": of} | {key: rank_correlation(noises, fit_of, accuracy_of, key) for key in CRITERIA}
        for of, noises in ((f"all {len(rows)}", arguments), (f"the {len(others)} without dead leaves", others))
        if len(noises) >= 5  # fewer say nothing
    ]
    if correlations:
        results.measure("rank correlation with the accuracy", correlations)
    points = {noise: [(fit_of[noise]["distance"], accuracy)] for noise, accuracy in accuracy_of.items()}
    panel = Panel(points, xlabel="distance from the teacher's running statistics", ylabel=ACCURACY_LABEL)
    results.plot("distance.png", lambda runs, path: plot_panels([panel], path))
    size = experiment.train_dataset.pretrained_cfg["input_size"]
    noises = {row: NoiseDataset(size, 48, distribution=noise_of(row), seed=options.seed) for row in options.noises}
    sheet = {row: noise.draw(0) for row, noise in noises.items()}
    results.plot("noises.png", lambda runs, path: plot_contact_sheet(sheet, path))
    results.print_table()


def rank_correlation(
    noises: Iterable[str], fit_of: Mapping[str, Mapping], accuracy_of: Mapping[str, float], key: str
) -> float | None:
    """Return how the order of the noises by a criterion goes with that by accuracy, or None where all are alike."""
    pairs = [(fit_of[noise][key], accuracy_of[noise]) for noise in noises]
    if any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(pairs).statistic)


if __name__ == "__main__":
    main()
