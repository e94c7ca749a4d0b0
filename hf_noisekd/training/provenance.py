"""How a student was made, out of the arguments, the teacher and the data of its training."""

from collections.abc import Sequence

from torch.utils.data import Dataset
from transformers.trainer_utils import SchedulerType

from hf_noisekd.batches import dataset_name
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.spec import noise_name
from hf_noisekd.release.environment import versions
from hf_noisekd.release.record import Evaluation, ImagesFacts, NoiseFacts, Provenance, TeacherFacts, better_statistics
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.teacher import Teacher


def describe_training(
    args: NoiseKDConfig,
    teacher: Teacher,
    train_dataset: Dataset,
    *,
    steps: int,
    evaluations: Sequence[Evaluation],
    has_statistics: bool,
) -> Provenance:
    """Return how a student was made.

    Args:
        args: Arguments of the training.
        teacher: Whose answers it learnt from.
        train_dataset: To what.
        steps: After how many steps it is as it is.
        evaluations: How good it is now.
        has_statistics: Whether it has BatchNorm layers.
    """
    noise = train_dataset if isinstance(train_dataset, NoiseDataset) else None
    images = None
    if real_images := getattr(noise, "real_images", None):
        images = ImagesFacts(images=len(real_images), dataset=dataset_name(real_images))
    if noise is None:
        method = "distillation on images"
    else:
        method = "distillation with noise" + ("" if images is None else " and real images")
    batch_norm = "running"
    if has_statistics:
        batch_norm = better_statistics(evaluations, taught_by_noise=noise is not None)
    return Provenance(
        method=method,
        batch_norm=batch_norm,
        teacher_batch_norm_fraction=args.batch_norm_fraction,
        loss_type=args.loss_type,
        temperature=args.temperature,
        learning_rate=args.learning_rate,
        lr_scheduler_type=SchedulerType(args.lr_scheduler_type).value,
        steps=steps,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        seed=args.seed,
        teacher=TeacherFacts(**teacher.identity),
        versions=versions(),
        noise=None if noise is None else _describe_noise(noise),
        real_images=images,
    )


def _describe_noise(noise: NoiseDataset) -> NoiseFacts:
    return NoiseFacts(
        distribution=noise_name(noise.distribution),
        image_sizes=[[list(size), share] for size, share in noise.image_sizes()],
        mean=noise.mean,
        std=noise.std,
        input_size=list(noise.input_size),
        seed=noise.seed,
    )
