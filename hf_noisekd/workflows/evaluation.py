"""Measure a model on labelled images, and put the result into its card."""

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from hf_noisekd.image_datasets import Images, load_images
from hf_noisekd.record.schema import Evaluation, Record, read_record
from hf_noisekd.release.card import write_model_card
from hf_noisekd.training.evaluation import measured
from hf_noisekd.workflows.inputs import UsageError, check_same_kind, usable_model


class Scores(dict[str, dict[str, float]]):
    """What [`evaluate`] measured, by kind of statistics, and on how many images."""

    images: int

    @classmethod
    def of(cls, found: Evaluation) -> "Scores":
        """Return the scores of an evaluation."""
        scores = cls(running=found.running, batch=found.batch)
        scores.images = found.images
        return scores


def evaluate(
    model: str | Path | nn.Module,
    dataset: str | Path | Dataset,
    *,
    checkpoint: str | Path | None = None,
    split: str = "test",
    image_column: str | None = None,
    label_column: str | None = None,
    num_images: int | None = None,
    teacher_model: str | Path | nn.Module | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    update_card: bool = False,
    trust_remote_code: bool = False,
) -> Scores:
    """Evaluate a classifier with running and with batch statistics.

    With batch statistics logits depend on the other images of a batch. So batches are of equal size: the last one is
    filled up with images from the start of the data set, which are not counted again.

    Args:
        model: The classifier: a module, which is evaluated where it is and comes back unchanged; the name of one as
            [`load_teacher`] takes it; or an ONNX file that [`export`] wrote.
        dataset: Images with labels, in the forms of [`collate_images`], preprocessed as for the model; the name of a
            data set as [`load_images`] takes it; or noise, a [`NoiseDataset`] with a length.
        checkpoint: File of weights for the timm architecture that `model` names, as [`load_teacher`] takes it.
        split: Split of a data set given by name, and for the card.
        image_column: Its column of images, where it has several.
        label_column: Its column of classes, likewise.
        num_images: Number of its images to draw at random. Default: all.
        teacher_model: Teacher to compare with, likewise; for noise with the statistics of the batch, else running ones.
        batch_size: Images in a batch. A `NoiseDataset` brings its own.
        num_workers: Processes that load the images.
        update_card: Put the result into record and card of the student in the folder `model`.
        trust_remote_code: Run the Python code that a transformers model on the Hub brings along.

    Returns:
        One mapping for `"running"` and one for `"batch"` statistics; the attribute `images` is the number of images.
        With labels each holds `accuracy`, `top5_accuracy` (where there are more than five classes), both in percent,
        and `loss`, the cross-entropy in nats; with a teacher `agreement`, the share of equal top-1 predictions in
        percent, and `kl`, `KL(teacher || model)` in nats.

    Raises:
        ValueError: The data set has no length or fewer than 2 images, a label is out of range, there is neither a label
            nor a teacher, an image or a logit is NaN or infinite, the teacher does not take the images of a data set
            given by name as the model does, or a model or a data set cannot be loaded.
    """
    record = _record_of(model) if update_card else None
    classifier = usable_model(model, checkpoint=checkpoint, trust_remote_code=trust_remote_code)
    teacher = None if teacher_model is None else usable_model(teacher_model, trust_remote_code=trust_remote_code)
    if isinstance(dataset, str | Path):
        given: Any = {"num_images": num_images, "image_column": image_column, "label_column": label_column}
        dataset = _images_for(classifier, teacher, dataset, split=split, **given)
    name, step = getattr(dataset, "name", None) or "evaluation images", record.steps if record else 0
    given = {"teacher_model": teacher, "batch_size": batch_size, "num_workers": num_workers}
    found = measured(classifier, dataset, name=name, split=split, step=step, **given)
    if record:
        write_model_card(record.measured(found), str(model))
    return Scores.of(found)


def _images_for(classifier: nn.Module, teacher: nn.Module | None, name: str | Path, **options: Any) -> Images:
    """Return a data set preprocessed for a classifier, and so for its teacher, too."""
    if teacher is not None:
        check_same_kind(classifier, teacher)
    return load_images(str(name), classifier, **options)


def _record_of(model: str | Path | nn.Module) -> Record:
    if isinstance(model, nn.Module) or not Path(model).is_dir():
        raise UsageError(f"update_card is for a student in a local folder, and model is {model}: give its folder.")
    return read_record(model)
