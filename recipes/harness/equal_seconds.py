"""Runs that are compared at equal seconds: by the cost of a step, which is measured beforehand."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from harness.experiment import Experiment


def timed(
    function: Callable, *args: Any, clock: Callable[[], float] = time.perf_counter, **kwargs: Any
) -> tuple[Any, float]:
    """Return what a function returns, and its seconds by a clock."""
    start = clock()
    return function(*args, **kwargs), clock() - start


def step_cost(experiment: Experiment, rows: Mapping[str, Mapping]) -> dict[str, float]:
    """Return the seconds of an average training step of each row, relative to the first one.

    Each row takes turns with the first one, and all rows have had a turn before any has the next. A row's figure is
    the median of its ratios, which neither some slow minutes of the machine move nor a slow hour. Resolutions count
    with their shares. All processes get those of process 0. They are recorded, and not measured again if the recipe
    is resumed.

    Args:
        experiment: The recipe's experiment.
        rows: Arguments of [`Experiment.distill`] by name.
    """
    if costs := experiment.results.record.get("step_costs"):
        return costs
    # A GPU's steps take milliseconds, among which the beginning of a training would count.
    steps = 20 if PartialState().device.type == "cpu" else 200
    steps_alone = {"max_steps": steps, "eval_strategy": "no", "disable_tqdm": True, "num_calibration_images": 0}
    trainers = {
        name: experiment.distillation_trainer(name, **arguments | steps_alone) for name, arguments in rows.items()
    }
    first, *others = rows

    def seconds(name: str) -> float:
        return trainers[name].train().metrics["train_runtime"]

    seconds(first)  # warms up
    ratios = {name: [] for name in others}
    for _ in range(1 if experiment.options.max_steps else 5):
        for name in others:
            reference = seconds(first)
            ratios[name].append(seconds(name) / reference)
    costs = {first: 1.0} | {name: round(statistics.median(values), 4) for name, values in ratios.items()}
    (costs,) = broadcast_object_list([costs])
    experiment.results.record_step_costs(costs)
    return costs


def distill_twice(
    experiment: Experiment, name: str, steps: int, steps_in_same_seconds: int, **arguments
) -> dict[str, float]:
    """Distill for a number of steps, and for the number that fits into the seconds of another run.

    Where the two differ by less than 2 %, which is within what the cost of a step varies by, one run is both.

    Args:
        experiment: The recipe's experiment.
        name: Name of the runs.
        steps: The first number.
        steps_in_same_seconds: The second one.
        **arguments: As for [`Experiment.distillation_trainer`].

    Returns:
        Steps, seconds and accuracy in percent (batch statistics) of both.
    """
    row, record = {}, None
    for kind, count in (("steps", steps), ("seconds", steps_in_same_seconds)):
        count = min(count, experiment.options.max_steps or count)
        if record is None or abs(count / record.steps - 1) > 0.02:
            record = experiment.distilled(f"{name}, equal {kind}", max_steps=count, **arguments)
        row |= {
            f"steps, equal {kind}": record.steps,
            f"seconds, equal {kind}": record.seconds,
            f"accuracy, equal {kind}": record.evaluations[0].batch["accuracy"],
        }
    return row
