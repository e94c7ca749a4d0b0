"""Distill a teacher into a student with noise: no image, no label, no generator network."""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from hf_noisekd.batches import DrawnDataset, SizedDataset, collate_images
from hf_noisekd.calibration.calibration_images import CalibrationImages
from hf_noisekd.models.batch_norm import find_batch_norm, stored_statistics
from hf_noisekd.models.classifier import class_names, compute_logits, copied_state, declared_input_size
from hf_noisekd.models.cpu_faults import training_memory_format
from hf_noisekd.models.saving import save_model
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.record.environment import command_line
from hf_noisekd.record.schema import Provenance, Record, current_evaluations
from hf_noisekd.training.agreement import AgreementLog
from hf_noisekd.training.checkpoints import check_checkpoint, check_length, last_whole_checkpoint
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.ending import Candidate, end_without_data
from hf_noisekd.training.features import StageFeatures
from hf_noisekd.training.losses import LOSSES
from hf_noisekd.training.plan import plan_training
from hf_noisekd.training.provenance import describe_training
from hf_noisekd.training.pushing import PushingTrainer
from hf_noisekd.training.timed_steps import TimedTrainer

logger = logging.getLogger(__name__)


class NoiseKDTrainer(PushingTrainer, TimedTrainer):
    """transformers' Trainer for noise distillation (Raikwar & Mishra, NeurIPS 2022, Algorithm 1).

    Each step draws a batch of noise on the training device, computes the logits of the frozen teacher for it, with its
    BatchNorm layers on the statistics of that batch, and trains the student on them. A teacher without BatchNorm is
    used as it is. The teacher, in the attribute `teacher`, never changes, and is neither wrapped for distributed
    training nor saved.

    Training logs `loss`, `agreement` (share of equal top-1 predictions in percent) and `class_balance`, the entropy of
    the teacher's mean prediction relative to that of all classes equally often: near 1 the noise reaches every class,
    near 0 only one, and nothing will be learnt.

    A training on noise alone ends with running statistics of images made without data, the attribute
    `calibration_images`, so that the student classifies single images in evaluation mode. Where these are not good
    enough there is a warning, the student keeps the statistics of the noise, and the attribute is None. It is also None
    where the teacher has no BatchNorm: the statistics of the noise hold for images then.

    Args:
        model: The student: a module from pixels to logits, a transformers image classifier, a timm name, or a Hub id or
            folder to train further. What is named by timm is built with the teacher's classes and input size, and is
            initialised from the teacher as far as its layers correspond. None cuts the teacher itself to `args.keep`,
            or another limit there.
        teacher_model: The teacher, likewise; a timm name loads its pretrained weights.
        args: Training arguments. [`NoiseKDConfig.paper`] has the authors' setting.
        data_collator: Collator for real images; noise needs none.
        train_dataset: Training images. Default: the noise that `args` name, in the teacher's input size. Of your own
            [`NoiseDataset`] seed and sizes are kept, not device and rank. A [`MixedDataset`] adds a few real images.
            Real images alone, whose labels are not used, give ordinary distillation.
        eval_dataset: Images with labels to evaluate on, or several by name. Default: held-out `images`, or noise.
        processing_class: Image processor to save with the student.
        callbacks: Callbacks beside the Trainer's own.
        optimizers: Optimizer and learning-rate scheduler to use instead of those in `args`.
        images: Unlabelled images of the teacher's task, at least 16, in the forms of [`collate_images`], preprocessed
            as for the student. A cut is chosen and repaired on them. They are trained on, beside noise or, where their
            statistics spoil the teacher itself, alone, but for a fourth, which is compared on.

    Raises:
        ValueError: The models or a data set do not fit each other or the method. Nothing is written then.
    """

    args: NoiseKDConfig

    def __init__(
        self,
        model: str | Path | nn.Module | None = None,
        teacher_model: str | Path | nn.Module | None = None,
        args: NoiseKDConfig | None = None,
        data_collator: Callable = collate_images,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        images: SizedDataset | None = None,
    ):
        args = NoiseKDConfig() if args is None else args
        plan = plan_training(model, teacher_model, args, train_dataset, eval_dataset, data_collator, images)
        super().__init__(
            model=plan.model,
            args=plan.args,
            data_collator=data_collator,
            train_dataset=plan.train_dataset,
            eval_dataset=plan.eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.start, self.images, self.planned_for = plan.initial, plan.images, plan.seconds
        self.teacher = plan.teacher.settle(plan.args, training_memory_format(plan.teacher.model, plan.args.device))
        self._frozen = list(find_batch_norm(self.model).values()) if plan.is_frozen else []
        self._features = None
        if args.match_features and self.start:
            self._features = StageFeatures(self.model, self.teacher_model, self.start.cut)
        self._agreement_log = AgreementLog(plan.teacher.num_classes, plan.args.device)
        self._ending: Candidate | None = None
        self.is_saved = False  # whether the output directory has the student after its last step
        self.count_steps(plan.counts_steps)

    @property
    def teacher_model(self) -> nn.Module:
        """The teacher as a module."""
        return self.teacher.model

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train the student and save it; see transformers' `Trainer.train`.

        The student is saved to the output directory straight after its last step, and again with the statistics that
        it is left with.

        Resuming is exact: step `k` sees the noise that it would have seen. The number of all steps must stay the same.
        True goes on from the last whole checkpoint, and starts anew if a kill fell into the first one.

        Raises:
            ValueError: The checkpoint is missing, cut off or, for noise of several sizes, of another number of steps.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, self.model)
            if resume_from_checkpoint is None:
                logger.warning("The training starts anew: it was cut off in its first checkpoint.")
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.model)
        self.settle_time(resume_from_checkpoint)
        updates = self.count_steps()  # once more: the arguments may have been changed
        if updates and resume_from_checkpoint and len(self.train_dataset.image_sizes()) > 1:
            check_length(resume_from_checkpoint, updates)
        self._agreement_log.forget()
        self._ending, self.is_saved = None, False
        with self._features or nullcontext():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.stopped_by_signal:
            return output
        self.save_model(_internal_call=True)  # before what may fail; without a push
        self.is_saved = True
        self._end()
        self.provenance().attach(self.model)
        self.save_model(_internal_call=True)
        return output

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluate the student; see transformers' `Trainer.evaluate`. Its provenance goes by the newest evaluations."""
        metrics = super().evaluate(*args, **kwargs)
        if not self.is_in_train and Provenance.of(self.model):
            self.provenance().attach(self.model)
        return metrics

    @property
    def stopped_by_signal(self) -> bool:
        """Whether the last training ended before its last step, in a checkpoint after a SIGTERM."""
        return self.args.enable_jit_checkpoint and self.state.global_step < self.state.max_steps

    def _end(self) -> None:
        """End a training on noise, or with given images, by [`end_without_data`], if all processes can.

        There is nothing to do for a student with random initial weights and a teacher that stores no statistics: that
        is one function for noise and for images, so the statistics of the noise hold.
        """
        made, wanted = self.provenance(), self.images or self.args.num_calibration_images
        could = self.start or (stored_statistics(self.model) and stored_statistics(self.teacher_model))
        on_noise_alone = made.noise and not made.real_images
        if not (could and wanted and (on_noise_alone or self.images)):
            return
        before = copied_state(self.model)
        ending = end_without_data(
            self.model,
            self.teacher,
            self.images,
            initial=self.start,
            num_noise=self.args.num_calibration_images,
            seed=self.args.seed,
            step=self._step_of_weights(),
        )
        if self._sum_over_processes(torch.tensor([float(ending is not None)])) < self.args.world_size:
            self.model.load_state_dict(before)
            return
        self._take_from_process_0(self.model.state_dict().values())
        self._ending = ending
        self._evaluations.clear()  # they were of another student

    @property
    def calibration_images(self) -> CalibrationImages | None:
        """The images that the student's running statistics are of."""
        return self._ending.images if self._ending else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the distillation loss of a batch with `pixel_values` `[B, C, H, W]`."""
        pixel_values = inputs["pixel_values"]
        for layer in self._frozen:  # the Trainer has the whole model in training mode
            layer.eval()
        if self.args.torch_compile and isinstance(self.train_dataset, NoiseDataset):
            # A graph for each resolution, rather than a slow one for all.
            torch._dynamo.mark_static(pixel_values)
        with self.accelerator.autocast():
            teacher_logits = self.teacher.training_logits(pixel_values)
        student_logits = compute_logits(model, pixel_values)
        loss = self.training_loss(student_logits, teacher_logits)
        self._agreement_log.add(teacher_logits, student_logits)
        return (loss, {"logits": student_logits}) if return_outputs else loss

    def distillation_loss(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return how far logits `[B, num_classes]` are from the teacher's; a subclass may have a loss of its own."""
        return LOSSES[self.args.loss_type](student_logits, teacher_logits, self.args.temperature)

    def training_loss(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of a training step: that of the logits, and where features are compared, of these, too."""
        loss = self.distillation_loss(student_logits, teacher_logits)
        return self._features.loss(loss) if self._features else loss

    def reference_logits(self, dataset: Dataset) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function to the teacher's logits: for noise as in training, for images as it is deployed."""
        return partial(self.teacher.logits, noise=isinstance(dataset, DrawnDataset))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the agreement and the class balance of the steps since the last entry."""
        if "loss" in logs:
            logs |= self._agreement_log.entry(self._sum_over_processes, self.args.world_size)
        super().log(logs, start_time)

    def _cause_of_divergence(self, logs: dict[str, float]) -> str:
        if math.isfinite(logs.get("class_balance", 0.0)):
            return ""
        return "The teacher's logits were not finite: look for such values in what it is given, or at its own weights."

    def record(self) -> Record:
        """Return what is known of the student. On process 0."""
        record = super().record()
        size = declared_input_size(self.teacher_model) or record.model.input_size or self.teacher.input_size
        record.model.input_size = list(size)
        record.model.num_classes = self.teacher.num_classes
        record.model.label_names = class_names(self.teacher_model, self.teacher.num_classes)
        record.noisekd = self.provenance()
        if self._ending and (agreement := self._ending.agreement):
            others = [evaluation for evaluation in record.evaluations if evaluation.dataset != agreement.dataset]
            record.evaluations = [*others, agreement]
        record.class_frequencies = self._agreement_log.class_frequencies if record.noisekd.is_data_free else None
        record.command = command_line()
        return record

    def provenance(self) -> Provenance:
        """Return how the student was made so far, and the statistics to use it with."""
        steps = self._step_of_weights()
        evaluations = current_evaluations(self._evaluations, steps)
        made = describe_training(self.args, self.teacher, self.train_dataset, self.model, evaluations, steps)
        made = replace(made, compares_features=self._features is not None)
        if self.images:
            made = replace(made, given_images=self.images.given)
        if self.start:
            made = replace(made, start=self.start.facts)
        if self._ending:
            made = replace(made, batch_norm="running")
            if (images := self._ending.images) is not None:
                made = replace(made, recalibration=images.real, calibration=images.facts)
            if made.start:
                made = replace(made, start=replace(made.start, training_helped=self._ending.is_trained))
        return made

    def _save_classifier(self, output_dir: str) -> None:
        save_model(self.model, output_dir, teacher_model=self.teacher_model, provenance=self.provenance())
