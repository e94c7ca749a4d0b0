"""Distil a teacher into a student with noise: no image, no label, no generator network."""

import copy
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from accelerate.data_loader import DataLoaderShard
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import HubStrategy, SaveStrategy, SchedulerType
from transformers.utils.hub import PushInProgress

from hf_noisekd.batches import collate_images
from hf_noisekd.files import replacing_files
from hf_noisekd.models.batch_norm import batch_statistics, has_batch_norm
from hf_noisekd.models.classifier import (
    answer_to_blanks,
    class_names,
    compute_logits,
    declared_input_size,
    format_size,
    teacher_identity,
)
from hf_noisekd.models.cpu_faults import layer_that_bfloat16_breaks, training_memory_format
from hf_noisekd.models.loading import load_student, load_teacher
from hf_noisekd.noise.dataset import NoiseDataset
from hf_noisekd.noise.mixed import MixedDataset
from hf_noisekd.noise.spec import noise_name
from hf_noisekd.release.card import write_model_card
from hf_noisekd.release.environment import command_line, versions
from hf_noisekd.release.push import RELEASED_FILES, check_hub_access, push_again, upload, upload_later
from hf_noisekd.training.checks import (
    check_batch_norm_is_local,
    check_checkpoint,
    check_eval_dataset,
    check_image_sizes,
    check_length,
    check_models,
    check_train_noise,
    last_whole_checkpoint,
    teacher_input_size,
)
from hf_noisekd.training.classifier_trainer import ClassifierTrainer
from hf_noisekd.training.config import NoiseKDConfig
from hf_noisekd.training.losses import LOSSES

logger = logging.getLogger(__name__)


class NoiseKDTrainer(ClassifierTrainer):
    """transformers' Trainer for noise distillation (Raikwar & Mishra, NeurIPS 2022, Algorithm 1).

    Each step draws a batch of noise on the training device, lets the frozen teacher answer it with its BatchNorm layers
    on the statistics of that batch, and trains the student on the answers. The teacher stays in evaluation mode; its
    weights and buffers never change, and it is neither wrapped for distributed training nor saved.

    Training logs `loss`, `agreement` (share of equal top-1 answers in percent) and `class_balance`, the entropy of the
    teacher's mean answer relative to that of all classes equally often: near 1 the noise reaches every class, near 0
    only one, and nothing will be learnt.

    Args:
        model: The student: a module from pixels to logits, a transformers image classifier, a timm name, which is
            built with the teacher's classes and input size, or a Hub id or folder to train further.
        teacher_model: The teacher, likewise; a timm name loads its pretrained weights. Needs BatchNorm layers.
        args: Training arguments. [`NoiseKDConfig.paper`] has the authors' setting.
        data_collator: Collator for real images; noise needs none.
        train_dataset: What the teacher answers in training. Default: the noise that `args` name, in the teacher's
            input size, at each rank its own. A [`NoiseDataset`] of yours keeps its seed and sizes; it is drawn on the
            training device whatever its own. A [`MixedDataset`] adds a few real images to the noise. A data set of
            real images gives ordinary distillation; labels are not used.
        eval_dataset: Images with labels to evaluate on, or a mapping of several by name. Default: held-out noise, on
            which the agreement with the teacher is measured.
        processing_class: Image processor to save with the student.
        callbacks: Callbacks beside the Trainer's own.
        optimizers: Optimizer and learning-rate scheduler to use instead of those in `args`.

    Raises:
        ValueError: The models do not fit each other or the method, or a data set cannot be used. All checks are made
            before anything is written.

    Example:
        ```python
        trainer = NoiseKDTrainer(model="resnet18_cifar", teacher_model="path/to/teacher")
        trainer.train()
        trainer.save_model("student")
        ```
    """

    _can_push = True

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module,
        args: NoiseKDConfig | None = None,
        data_collator: Callable = collate_images,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = NoiseKDConfig() if args is None else args
        teacher_model = load_teacher(teacher_model)
        teacher_statistics = batch_statistics(teacher_model, args.batch_norm_fraction, seed=args.seed)
        input_size = teacher_input_size(args, teacher_model, train_dataset, data_collator)
        noise = {"input_size": input_size, "seed": args.seed, "distribution": args.noise}
        noise |= {} if args.noise_std is None else {"std": args.noise_std}
        if train_dataset is None:
            train_dataset = NoiseDataset.for_model(
                teacher_model,
                batch_size=args.per_device_train_batch_size,
                num_steps=args.steps_per_epoch,
                resolutions=args.resolutions,
                **noise,
            )
        elif isinstance(train_dataset, NoiseDataset):
            noise |= {key: getattr(train_dataset, key) for key in ("distribution", "mean", "std")}
        if eval_dataset is None:
            eval_dataset = NoiseDataset.for_model(
                teacher_model,
                batch_size=args.per_device_eval_batch_size,
                num_steps=args.eval_noise_batches,
                held_out=True,
                **noise,
            )
        check_train_noise(train_dataset, args)
        num_classes = answer_to_blanks(teacher_model, input_size, "teacher").shape[-1]
        set_seed(args.seed)  # before a student given by name gets its random weights
        model = load_student(model, num_classes=num_classes, input_size=input_size)
        check_batch_norm_is_local(teacher_model, args.world_size)
        check_models(model, teacher_model, input_size, num_classes, explicit_size=args.input_size is not None)
        image_sizes = {input_size[1:]}
        if isinstance(train_dataset, NoiseDataset):
            check_image_sizes(train_dataset, teacher_model, model)
            image_sizes = {size for size, _ in train_dataset.image_sizes()}
        args = _without_wrong_gradients(args, model, [(input_size[0], *size) for size in sorted(image_sizes)])
        if eval_dataset == {}:
            raise ValueError("eval_dataset is an empty mapping: leave it out to evaluate on held-out noise.")
        for dataset in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            check_eval_dataset(dataset, input_size, num_classes, data_collator)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        memory_format = training_memory_format(teacher_model, self.args.device)
        # A plain attribute, not a part of the student: neither wrapped, optimised nor saved.
        self.teacher_model = teacher_model.to(self.args.device, memory_format=memory_format).eval()
        self._teacher_forward = (
            torch.compile(
                self.teacher_model, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode
            )
            if self.args.torch_compile
            else self.teacher_model
        )
        self._teacher_statistics = teacher_statistics
        self._loss_fn = LOSSES[self.args.loss_type]
        self.train_dataset = self._on_this_device(self.train_dataset)
        self._fills_total_steps = (
            isinstance(self.train_dataset, NoiseDataset) and self.train_dataset.total_steps is None
        )
        if self._fills_total_steps:
            _, self.train_dataset.total_steps = self._training_length()
        self.eval_dataset = (
            {name: self._on_this_device(dataset, rank=0) for name, dataset in self.eval_dataset.items()}
            if isinstance(self.eval_dataset, dict)
            else self._on_this_device(self.eval_dataset, rank=0)
        )
        self._noise_size = input_size
        # Sums over the steps since the last log entry, kept on the device.
        self._answer_sum = torch.zeros(num_classes, device=self.args.device)
        self._agreement_sum = torch.zeros((), device=self.args.device)
        self._forget_answers()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train the student; see transformers' `Trainer.train`.

        Resuming is exact: step `k` sees the noise it would have seen without the break, at no cost for the steps
        before. The sizes of the noise and the learning rate go by the number of all steps, which must stay the same.

        Raises:
            ValueError: The checkpoint is missing or damaged, or of a training of another length whose noise has several
                sizes. Nothing has been changed then.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir, self.model)
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self.model)
        if self._fills_total_steps:  # once more: the arguments may have been changed
            updates, self.train_dataset.total_steps = self._training_length()
            if resume_from_checkpoint and len(self.train_dataset.image_sizes()) > 1:
                check_length(resume_from_checkpoint, updates)
        self._forget_answers()
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.model.noisekd = self.noisekd_section(self._progress())
        return output

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader of the training batches.

        For noise it gives step numbers, and the noise is drawn where the step runs: steps before a resumption cost
        nothing, and gradient accumulation does not hold several batches. It is not prepared by Accelerate, which would
        draw on rank 0 and broadcast, or draw every rank's noise on each.
        """
        if not isinstance(self.train_dataset, NoiseDataset):
            return super().get_train_dataloader()
        return DataLoaderShard(_NoiseSteps(self.train_dataset), batch_size=None)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Return the number of training images in an epoch, over all processes."""
        if isinstance(dataloader.dataset, _NoiseSteps):
            return len(dataloader) * self.train_dataset.batch_size * self.args.world_size
        return super().num_examples(dataloader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the distillation loss of a batch with `pixel_values` `[B, C, H, W]`."""
        pixel_values = inputs["pixel_values"]
        with torch.no_grad(), self._teacher_statistics, self.accelerator.autocast():
            teacher_logits = compute_logits(self._teacher_forward, self._of_fixed_size(pixel_values)).float()
        self._answer_sum += teacher_logits.softmax(-1).mean(0)
        student_logits = compute_logits(model, self._of_fixed_size(pixel_values))
        loss = self._loss_fn(student_logits, teacher_logits, self.args.temperature)
        with torch.no_grad():
            self._agreement_sum += (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float().mean()
            self._steps_since_log += 1
        return (loss, {"logits": student_logits}) if return_outputs else loss

    def _of_fixed_size(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return noise so that a compiled model gets a graph for each resolution, rather than a slow one for all."""
        if self.args.torch_compile and isinstance(self.train_dataset, NoiseDataset):
            torch._dynamo.mark_static(pixel_values)
        return pixel_values

    def teacher_answers_for(self, dataset: Dataset) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the teacher's answers: to noise as in training, to images as it is deployed."""
        if not isinstance(getattr(dataset, "noise", dataset), NoiseDataset):
            return lambda pixel_values: compute_logits(self.teacher_model, pixel_values)

        def answers(pixel_values: torch.Tensor) -> torch.Tensor:
            with self._teacher_statistics:
                return compute_logits(self.teacher_model, pixel_values)

        return answers

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the agreement and the class balance of the steps since the last entry."""
        if "loss" in logs and self._steps_since_log:
            sums = torch.cat([self._answer_sum, self._agreement_sum[None]])
            *answer, agreement = (
                self._sum_over_processes(sums) / (self.args.world_size * self._steps_since_log)
            ).tolist()
            logs["agreement"] = 100 * agreement
            logs["class_balance"] = -sum(p * math.log(p) for p in answer if p > 0) / math.log(len(answer))
            self._logged_answers = [
                total + p * self._steps_since_log for total, p in zip(self._logged_answers, answer, strict=True)
            ]
            self._logged_steps += self._steps_since_log
            self._forget_steps_since_log()
        super().log(logs, start_time)

    def record(self) -> dict:
        """Return what is known of the student, as plain data; see [`hf_noisekd.release.record`]. On process 0."""
        record = super().record()
        names = class_names(self.teacher_model, len(self._logged_answers))
        record["model"] |= {"label_names": names, "num_classes": len(names)}
        size = declared_input_size(self.teacher_model) or record["model"].get("input_size") or self._noise_size
        record["model"]["input_size"] = list(size)
        record["noisekd"] = self.noisekd_section(record)
        if self._logged_steps and "noise" in record["noisekd"] and "real_images" not in record["noisekd"]:
            record["class_frequencies"] = [round(total / self._logged_steps, 6) for total in self._logged_answers]
        if command := command_line():
            record["command"] = command
        return record

    @cached_property
    def _teacher_identity(self) -> dict:
        return teacher_identity(self.teacher_model)

    def noisekd_section(self, record: Mapping) -> dict:
        """Return the section `noisekd` of `config.json`; see [`hf_noisekd.models.classifier.noisekd_section`].

        The student is to be run with the statistics with which it is better on labelled images, running statistics
        having the benefit of one percentage point. Where there are none, on batch statistics if noise taught it.
        """
        noise = self.train_dataset if isinstance(self.train_dataset, NoiseDataset) else None
        with_batch_norm = has_batch_norm(self.model)
        batch_norm = "batch" if noise is not None and with_batch_norm else "running"
        for evaluation in record["evaluations"]:
            if "accuracy" in evaluation["batch"] and with_batch_norm:
                lead = evaluation["batch"]["accuracy"] - evaluation["running"]["accuracy"]
                batch_norm = "batch" if lead > 1 else "running"
        section = {
            "method": "distillation on images" if noise is None else "distillation with noise",
            "batch_norm": batch_norm,
            "teacher_batch_norm_fraction": self.args.batch_norm_fraction,
            "loss_type": self.args.loss_type,
            "temperature": self.args.temperature,
            "learning_rate": self.args.learning_rate,
            "lr_scheduler_type": SchedulerType(self.args.lr_scheduler_type).value,
            "steps": record["steps"],
            "batch_size": self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "seed": self.args.seed,
            "teacher": self._teacher_identity,
            "versions": versions(),
        }
        if noise is not None:
            section["noise"] = {
                "distribution": noise_name(noise.distribution),
                "image_sizes": [[list(size), share] for size, share in noise.image_sizes()],
                "mean": noise.mean,
                "std": noise.std,
                "input_size": list(noise.input_size),
                "seed": noise.seed,
            }
        if isinstance(noise, MixedDataset):
            section["method"] = "distillation with noise and real images"
            section["real_images"] = noise.describe_images()
        return section

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs,
    ) -> None:
        """Write the student's card, `README.md` with figures, and its record `noisekd.json` to the output folder.

        Evaluate and save the student before: the card reports the last evaluation.

        Args:
            language: Language of the class names.
            license: Licence of the student; by default the teacher's, where it is known.
            tags: Tags beside the usual ones.
            model_name: Title of the card.
            **kwargs: Accepted because scripts for transformers' Trainer give them; not used.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "repo_id": self.hub_model_id,
            "language": language,
            "license": license,
            "tags": [tags] if isinstance(tags, str) else tags,
            "title": model_name,
        }
        write_model_card(self.record() | {key: value for key, value in given.items() if value}, self.args.output_dir)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure, before the first step, that the student's repository is there and can be written to.

        Raises:
            HubError: It cannot; the message says why and what to do.
        """
        if self.is_world_process_zero():
            self.hub_model_id = check_hub_access(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo if private is None else private,
            )
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the student with its card, and push both to the Hub; see transformers' `Trainer.push_to_hub`.

        Args:
            commit_message: Title of the commit.
            blocking: Whether to wait for the end of the upload.
            token: Token with write access; by default that of the arguments or of `hf auth login`.
            revision: Branch to commit to.
            private: Whether a new repository is private.
            **kwargs: As in [`create_model_card`].

        Returns:
            The commit, or its future if not `blocking`. None on all processes but the first.

        Raises:
            HubError: The Hub refuses or cannot be reached. The student has been saved then. The future of a push that
                does not block raises what huggingface_hub raises.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        return (upload if blocking else upload_later)(
            self.args.output_dir,
            self.hub_model_id,
            token=token,
            commit_message=commit_message,
            revision=revision or self.args.hub_revision,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # transformers' own would upload the pickled training arguments, with the token in them, and lose the errors.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done() and not self.args.hub_always_push:
                return
            self._report_failed_pushes()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with replacing_files(self.args.output_dir) as staging:
            for file in Path(checkpoint_folder).iterdir():
                if any(file.match(pattern) for pattern in RELEASED_FILES):
                    shutil.copy(file, staging)
        try:
            self._start_push(checkpoint_folder)
        except Exception as error:  # of a full disk, or of anything that must not end a training
            self._warn_of_failed_push(error)

    def _start_push(self, checkpoint_folder: str) -> None:
        self.create_model_card()
        where = (
            f"step {self.state.global_step}"
            if self.args.save_strategy == SaveStrategy.STEPS
            else f"epoch {int(self.state.epoch)}"
        )
        to = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        message = f"Training in progress, {where}"
        jobs = [upload_later(self.args.output_dir, self.hub_model_id, commit_message=message, **to)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                upload_later(
                    checkpoint_folder,
                    self.hub_model_id,
                    patterns=["*"],
                    path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    **to,
                )
            )
        unfinished = [] if self.push_in_progress is None else self.push_in_progress.jobs
        self.push_in_progress = PushInProgress(unfinished + jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Warn of the uploads that failed since the last call, and forget those that are done."""
        if getattr(self, "push_in_progress", None) is None:
            return
        for job in self.push_in_progress.jobs:
            if job.done() and job.exception() is not None:
                self._warn_of_failed_push(job.exception())
        self.push_in_progress.jobs = [job for job in self.push_in_progress.jobs if not job.done()]

    def _warn_of_failed_push(self, error: BaseException) -> None:
        advice = push_again(self.args.output_dir, self.hub_model_id, error, self.args.hub_revision)
        logger.warning("Training goes on. %s", advice)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            self.model.noisekd = self.noisekd_section(self._progress())
        super()._save(output_dir, state_dict)

    def _forget_answers(self) -> None:
        # Over all steps that were logged, the sum of the teacher's mean answers, and their number.
        self._logged_answers = [0.0] * len(self._answer_sum)
        self._logged_steps = 0
        self._forget_steps_since_log()

    def _forget_steps_since_log(self) -> None:
        self._answer_sum.zero_()
        self._agreement_sum.zero_()
        self._steps_since_log = 0

    def _prepare_inputs(self, inputs):
        if "noise_step" in inputs:
            inputs = {"pixel_values": self.train_dataset.draw(inputs["noise_step"])}
        return super()._prepare_inputs(inputs)

    def _training_length(self) -> tuple[int, int]:
        """Return the numbers of updates and of batches of the whole training.

        The last update of an epoch may have fewer batches than the others.
        """
        updates, accumulation = self.args.max_steps, self.args.gradient_accumulation_steps
        if self.train_dataset.num_steps is None:
            return updates, updates * accumulation
        batches = len(self.train_dataset)
        updates_per_epoch = math.ceil(batches / accumulation)
        if updates <= 0:
            updates = math.ceil(self.args.num_train_epochs * updates_per_epoch)
        epochs, rest = divmod(updates, updates_per_epoch)
        return updates, epochs * batches + min(rest * accumulation, batches)

    def _on_this_device(self, dataset: Dataset | None, rank: int | None = None) -> Dataset | None:
        """Return noise that is drawn for this process in the form its steps want; other data sets as they are."""
        if not isinstance(dataset, NoiseDataset):
            return dataset
        dataset = copy.copy(dataset)
        dataset.device = self.args.device
        dataset.rank = self.args.process_index if rank is None else rank
        dataset.memory_format = self.memory_format
        dataset.dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        return dataset


def _without_wrong_gradients(
    args: NoiseKDConfig, model: nn.Module, input_sizes: list[tuple[int, int, int]]
) -> NoiseKDConfig:
    """Return arguments that train in float32 where a CPU cannot train the student in bfloat16 on these images."""
    if args.mixed_precision != "bf16" or args.device.type != "cpu":
        return args
    for input_size in input_sizes:
        if layer := layer_that_bfloat16_breaks(model, input_size):
            logger.warning(
                "The student is trained in float32: its layer %s gets maps so small from images of %s that a CPU "
                "computes its gradient in bfloat16 wrongly. Larger images, or noise of full size only "
                "(resolutions='1'), may spare it that.",
                layer,
                format_size(input_size),
            )
            args = copy.copy(args)
            args.bf16, args.mixed_precision = False, "no"
            break
    return args


class _NoiseSteps(IterableDataset):
    """The step numbers of a [`NoiseDataset`], for a loader that leaves the drawing to the training step."""

    def __init__(self, noise: NoiseDataset):
        self.noise = noise

    def set_epoch(self, epoch: int) -> None:
        self.noise.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, int]]:
        return ({"noise_step": step} for step in self.noise.steps())

    def __len__(self) -> int:
        return len(self.noise)
