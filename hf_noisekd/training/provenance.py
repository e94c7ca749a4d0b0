"""How a student was made, out of the arguments, the teacher and the data of its training."""

from collections.abc import Sequence

from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType

from hf_noisekd.models.batch_norm import has_batch_norm
from hf_noisekd.models.classifier import architecture_of, count_parameters, declared_input_size, pretrained_cfg_of
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.mixed import MixedDataset
from hf_noisekd.noise.spec import noise_name
from hf_noisekd.record.environment import versions
from hf_noisekd.record.schema import (
    Evaluation,
    ModelFacts,
    NoiseFacts,
    Provenance,
    TeacherFacts,
    better_statistics,
)
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.teacher import Teacher


def describe_model(model: nn.Module) -> ModelFacts:
    """Return what is known of a network."""
    library = "transformers" if isinstance(model, PreTrainedModel) else "torch"
    size = declared_input_size(model)
    return ModelFacts(
        architecture=architecture_of(model),
        library="timm" if pretrained_cfg_of(model).get("architecture") else library,
        parameters=count_parameters(model),
        input_size=None if size is None else list(size),
        has_batch_norm=has_batch_norm(model),
    )


def describe_training(
    args: NoiseKDConfig,
    teacher: Teacher,
    dataset: Dataset,
    model: nn.Module,
    evaluations: Sequence[Evaluation],
    steps: int,
) -> Provenance:
    """Return how the student `model` was made in `steps` steps, with the `evaluations` after them."""
    method, noise, images, number = "distillation on images", None, None, 0
    if isinstance(dataset, NoiseDataset) and getattr(dataset, "share", 0) < 1:
        method = "distillation with noise"
        noise = NoiseFacts(
            distribution=noise_name(dataset.distribution),
            image_sizes=dataset.image_sizes(),
            mean=dataset.mean,
            std=dataset.std,
            input_size=list(dataset.input_size),
            seed=dataset.seed,
        )
    if isinstance(dataset, MixedDataset):
        images = dataset.real
        number = len(dataset.images) - (images.images if images else 0)
        method += " and real images" if noise and images else ""
    better = better_statistics(evaluations, taught_on_batch=noise is not None and teacher.weight_of_batch > 0)
    return Provenance(
        method=method,
        batch_norm=better if has_batch_norm(model) else "running",
        teacher_batch_norm_fraction=args.batch_norm_fraction,
        teacher_statistics=teacher.statistics,
        loss_type=args.loss_type,
        temperature=args.temperature,
        learning_rate=args.learning_rate,
        lr_scheduler_type=SchedulerType(args.lr_scheduler_type).value,
        steps=steps,
        batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        seed=args.seed,
        teacher=TeacherFacts(**teacher.identity),
        versions=versions(),
        noise=noise,
        real_images=images,
        made_images=number,
    )
