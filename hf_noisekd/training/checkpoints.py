"""Checkpoints to resume from, and to go back to from a training whose numbers are no longer finite."""

import json
import logging
import zipfile
from pathlib import Path

import safetensors
from torch import nn

from hf_noisekd.files import WEIGHTS_NAME
from hf_noisekd.models.classifier import bare_model, nonfinite_tensor
from hf_noisekd.models.loading import differing
from hf_noisekd.training.config import ClassifierConfig

logger = logging.getLogger(__name__)


def last_whole_checkpoint(output_dir: str, model: nn.Module) -> str | None:
    """Return the last whole checkpoint in a folder, passing over any that a kill cut off.

    None if the kill fell into the first one; a `ValueError` if there is none of a training of `model`.
    """
    found = {path.name.removeprefix("checkpoint-"): path for path in Path(output_dir).glob("checkpoint-*")}
    problem = None
    for step in sorted(filter(str.isdigit, found), key=int, reverse=True):
        try:
            check_checkpoint(str(found[step]), model)
            return str(found[step])
        except ValueError as error:
            logger.warning("Passing over a checkpoint. %s", error)
            problem = problem if is_cut_off(found[step]) else problem or error
    if problem:
        raise ValueError(f"{problem} To train from the beginning, delete {output_dir!r} first.")
    if not found and not any(Path(output_dir).glob(".checkpoint-*.saving")):  # as `replacing_files` calls it
        raise ValueError(
            f"There is no checkpoint to resume from in {output_dir!r}: train without resume_from_checkpoint, and, if "
            "something is in it that you no longer need, delete it first."
        )
    return None


def find_whole_checkpoint(output_dir: str, model: nn.Module) -> str | None:
    """Return the last whole checkpoint in a folder, or None where there is none, whatever the reason."""
    try:
        return last_whole_checkpoint(output_dir, model)
    except ValueError:
        return None


def name_last_checkpoint(output_dir: str, model: nn.Module) -> str:
    """Return a sentence about the last whole checkpoint in a folder."""
    checkpoint = find_whole_checkpoint(output_dir, model)
    return f"The last whole checkpoint is {checkpoint}." if checkpoint else "There is no whole checkpoint."


def is_cut_off(folder: Path) -> bool:
    """Whether a checkpoint lacks the file that is written last, or the end of it."""
    try:
        json.loads((folder / "trainer_state.json").read_text())
    except (FileNotFoundError, ValueError):
        return True
    return False


def check_checkpoint(folder: str, model: nn.Module) -> None:
    """Raise a `ValueError` if `folder` holds no whole checkpoint of `model`."""
    path = Path(folder)
    advice = "Resume from another checkpoint, or train without resume_from_checkpoint."
    if not path.is_dir():
        raise ValueError(f"There is no checkpoint folder {folder!r}. {advice}")
    needed = (WEIGHTS_NAME, "optimizer.pt", "scheduler.pt", "trainer_state.json")
    if missing := [name for name in needed if not (path / name).is_file()]:
        raise ValueError(f"The checkpoint {folder!r} is not whole: {', '.join(missing)} missing. {advice}")
    # An archive of torch's that was cut off lacks its end, and weights lack some of what their header lists.
    cut_off = [file.name for file in path.glob("*.pt*") if not zipfile.is_zipfile(file)]
    cut_off += ["trainer_state.json"] if is_cut_off(path) else []
    try:
        with safetensors.safe_open(path / WEIGHTS_NAME, framework="pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except safetensors.SafetensorError:
        cut_off.append(WEIGHTS_NAME)
    if cut_off:
        raise ValueError(f"The checkpoint {folder!r} is not whole: {', '.join(cut_off)} cut off. {advice}")
    model = bare_model(model)  # as which it is saved
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if names := differing(expected, shapes):
        raise ValueError(
            f"The checkpoint {folder!r} is of another model: {len(names)} tensors differ, first {names[0]!r}. {advice}"
        )


def check_length(folder: str, steps: int) -> None:
    """Raise a `ValueError` if the checkpoint in `folder` is not of a training of `steps` steps."""
    found = json.loads((Path(folder) / "trainer_state.json").read_text())["max_steps"]
    if found != steps:
        raise ValueError(
            f"The checkpoint {folder!r} is of a training of {found:,} steps, and this one has {steps:,}: the sizes of "
            f"its noise are shares of that number. Resume with max_steps={found}, or go on in full size with "
            "resolutions='1'."
        )


def check_weights(model: nn.Module, args: ClassifierConfig, step: int) -> None:
    """Raise a `FloatingPointError` if a weight or a buffer of the model that is trained holds a NaN or an infinity."""
    if name := nonfinite_tensor(model):
        raise diverged(f"The model's {name!r} holds a NaN or an infinity", model, args, step)


def diverged(what: str, model: nn.Module, args: ClassifierConfig, step: int, cause: str = "") -> FloatingPointError:
    """Return the error that says what is not finite after which step, and why; by default what is likely."""
    causes = [f"a learning rate of {args.learning_rate} that is too high", "images with such values"]
    if args.fp16:
        causes.append("the small range of fp16 (bf16 has a larger one)")
    cause = cause or f"Likely causes: {', or '.join(causes)}."
    return FloatingPointError(f"{what} at step {step:,}. {cause} {name_last_checkpoint(args.output_dir, model)}")
