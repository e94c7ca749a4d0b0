"""What all trainers here share: they train classifiers, read them in two ways, save and record them."""

import math
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from hf_noisekd.batches import DrawnDataset, dataset_name
from hf_noisekd.files import naming_full_disk, replacing_files
from hf_noisekd.models.classifier import compute_logits
from hf_noisekd.models.cpu_faults import fast_depthwise, training_memory_format
from hf_noisekd.models.memory import is_out_of_memory, keep_freed_memory
from hf_noisekd.models.saving import save_model
from hf_noisekd.record.environment import Machine, versions
from hf_noisekd.record.schema import Evaluation, Provenance, Record, current_evaluations
from hf_noisekd.training.checkpoints import check_weights, diverged, is_cut_off, name_last_checkpoint
from hf_noisekd.training.checks import check_batch_norm_is_local
from hf_noisekd.training.config import ClassifierConfig
from hf_noisekd.training.evaluation import counts_of, evaluate_loader, evaluated_dataset, evaluation_loader
from hf_noisekd.training.provenance import describe_model


class BaseTrainer(Trainer):
    """transformers' Trainer for any image classifier, timm's, transformers' or a plain module.

    It reports accuracy under running and under batch statistics at each evaluation (`eval_running_accuracy`,
    `eval_batch_accuracy`, ..., see [`hf_noisekd.evaluate`]), saves checkpoints that timm and transformers read, and
    keeps a [`Record`]. Children define the loss. It takes what transformers' Trainer takes, apart from what replaces
    the model, the loss or the metrics.
    """

    # What transformers' Trainer keeps, for the type checker.
    args: ClassifierConfig
    model: nn.Module
    control: TrainerControl
    train_dataset: Any
    eval_dataset: Any

    def __init__(self, model: nn.Module, args: ClassifierConfig, *others, **kwargs):
        check_batch_norm_is_local(model, args.world_size)
        super().__init__(model, args, *others, **kwargs)
        # The loss is a mean over the batch; without these the Trainer takes models with keyword arguments to have
        # divided it by the number of accumulation steps already.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self._resumed = False
        self._evaluations: list[tuple[Evaluation, bool]] = []  # each with whether it was made in the training
        self.memory_format = training_memory_format(self.model, self.args.device)
        self.model.to(memory_format=self.memory_format)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train the model; see transformers' `Trainer.train`.

        The model comes back without the autocast that Accelerate wraps around its forward pass, so that it computes in
        float32 in anybody's hands.

        Raises:
            FloatingPointError: A loss that was logged, or a weight that was to be saved, is a NaN or an infinity.
        """
        # What a loaded model says of its own making does not hold for what it becomes.
        Provenance.detach(self.model)
        self.model.__dict__.pop("origin", None)
        self._evaluations = []
        self._resumed = bool(resume_from_checkpoint)
        if self.args.device.type == "cpu":
            keep_freed_memory()
        try:
            with fast_depthwise(self.model, self.args.device):
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        except Exception as error:
            if is_out_of_memory(error):
                number = self.args.train_batch_size
                raise RuntimeError(
                    f"There is too little memory for a batch of {number} images: set per_device_train_batch_size to "
                    f"{max(2, number // 2)} or less, and per_device_eval_batch_size likewise if it was an evaluation."
                ) from error
            raise
        finally:
            self._unwrap_model()
        check_weights(self.model, self.args, self.state.global_step)  # of the steps since the last log entry, too
        return output

    def _run_epoch(self, *args, **kwargs) -> None:
        # transformers would take one step more of a training that was resumed after its last.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log an entry, unless its loss ends the training."""
        loss = logs.get("loss", logs.get("train_loss", 0.0))  # of a step, or the mean of all
        if not math.isfinite(loss):
            cause = self._cause_of_divergence(logs)
            raise diverged(f"The loss is {loss}", self.model, self.args, self.state.global_step, cause)
        super().log(logs, start_time)

    def _cause_of_divergence(self, logs: dict[str, float]) -> str:
        """Return what a log entry tells of the cause of a loss that is not finite, if anything."""
        return ""

    def _unwrap_model(self) -> None:
        """Take off what Accelerate put around the model, so that another call wraps it anew."""
        # Accelerate's own `unwrap_model(keep_fp32_wrapper=False)` would strip the decorators of transformers' models.
        for attribute in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(attribute, None)
        self.model_wrapped = self.model

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """Return this process's share of the evaluation batches; see [`evaluation_loader`]."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(eval_dataset, str):
            dataset = self.eval_dataset[eval_dataset]
        if dataset is None:
            raise ValueError("There is nothing to evaluate on: pass an eval_dataset.")
        return evaluation_loader(
            dataset,
            self.args.eval_batch_size,
            rank=self.args.process_index,
            world_size=self.args.world_size,
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator,
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate under running and under batch statistics; `Trainer.evaluate` calls it."""
        if description == "Prediction":
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            if not self.is_in_train:
                self._unwrap_model()
            return output
        self._take_from_process_0(self.model.buffers())  # as DDP does before each forward pass
        self.callback_handler.eval_dataloader = dataloader
        # Out of training the model is measured as it will be deployed, in float32.
        with self.accelerator.autocast() if self.is_in_train else nullcontext():
            scores = evaluate_loader(
                self.model,
                dataloader,
                teacher_logits_of=self.reference_logits(evaluated_dataset(dataloader)),
                reduce=self._sum_over_processes,
                on_batch=self._on_prediction_step,
            )
        metrics = {
            f"{metric_key_prefix}_{statistics}_{name}": value
            for statistics, values in scores.items()
            for name, value in values.items()
        }
        images = int(self._sum_over_processes(torch.tensor([float(sum(counts_of(dataloader)))])))
        self._evaluations.append((self._evaluation(dataloader, images, metric_key_prefix, scores), self.is_in_train))
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=images)

    def reference_logits(self, dataset: Dataset) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return the function from pixels of `dataset` to the logits that the model's agreement is measured with."""
        return None

    def _evaluation(self, dataloader: DataLoader, images: int, log_prefix: str, scores: dict) -> Evaluation:
        dataset = evaluated_dataset(dataloader)
        named = self.eval_dataset.items() if isinstance(self.eval_dataset, dict) else ()
        batch_size = dataset.batch_size if isinstance(dataset, DrawnDataset) else self.args.eval_batch_size
        autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(self.accelerator.mixed_precision)
        own_name = dataset_name(dataset) or "evaluation images"
        return Evaluation(
            dataset=next((name for name, value in named if value is dataset), own_name),
            images=images,
            batch_size=min(batch_size, images),
            step=self._step_of_weights(),
            precision=(self.is_in_train and autocast) or "float32",
            log_prefix=log_prefix,
            **scores,
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Return the loss, the logits under running statistics and the labels of a batch; for `Trainer.predict`."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = compute_logits(model, inputs["pixel_values"]).float()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return loss, logits, labels

    def record(self) -> Record:
        """Return what is known of the training so far, with its [`current_evaluations`]. On process 0."""
        history = self.state.log_history
        record = Record(
            model=describe_model(self.model),
            steps=self._step_of_weights(),
            evaluations=current_evaluations(self._evaluations, self._step_of_weights()),
            processes=self.args.world_size,
            machine=Machine.of(self.args.device),
            versions=versions(),
            curve=[entry for entry in history if "train_runtime" not in entry],
        )
        for entry in history:
            if "train_runtime" in entry and not self._resumed:
                record.seconds = round(entry["train_runtime"], 1)
                record.images_per_second = round(entry["train_samples_per_second"], 1)
        return record

    def _step_of_weights(self) -> int:
        """Return the step after which the model had its weights: the last, or that of the checkpoint loaded as best."""
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and not self.is_in_train and best:
            return int(Path(best).name.rpartition("-")[2])
        return self.state.global_step

    def _save_checkpoint(self, model, trial) -> None:
        """Save a checkpoint, or nothing: what is half-written when something fails or is interrupted goes away."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # Written last; that of another training must not vouch for this one.
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        try:
            with naming_full_disk(folder):
                super()._save_checkpoint(model, trial)
        except BaseException as error:
            if self.args.should_save and is_cut_off(folder):
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise OSError(f"{error} {name_last_checkpoint(self.args.output_dir, self.model)}") from error
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # Unlike transformers' this leaves the training arguments out: pickled, and with the user's token in them.
        if self.args.should_save:
            check_weights(self.model, self.args, self.state.global_step)
            output_dir = output_dir or self.args.output_dir
            self._save_classifier(output_dir)
            if self.processing_class is not None:
                with replacing_files(output_dir) as staging:
                    self.processing_class.save_pretrained(staging)

    def _save_classifier(self, output_dir: str) -> None:
        save_model(self.model, output_dir)

    def _on_prediction_step(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _take_from_process_0(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors if self.args.world_size > 1 else ():
            of_first = tensor.contiguous()
            torch.distributed.broadcast(of_first, src=0)
            tensor.copy_(of_first)

    def _sum_over_processes(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.args.world_size == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.args.device), reduction="sum").cpu()
