"""Training arguments: what transformers' `TrainingArguments` has, with defaults and checks for this method."""

import math
import os
import typing
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.utils import is_torch_bf16_gpu_available

from hf_noisekd.noise.dataset import MAX_STEPS
from hf_noisekd.noise.spec import parse_noise, parse_resolutions
from hf_noisekd.training.losses import LOSSES

NUMBERS = {int, float, bool, NoneType}
ABOVE_ZERO = {"gradient_accumulation_steps", "logging_steps", "eval_steps", "save_steps", "num_train_epochs"}
ABOVE_ZERO |= {"steps_per_epoch", "eval_noise_batches", "max_hours", "temperature", "noise_std"}
NOT_NEGATIVE = {"learning_rate", "weight_decay", "dataloader_num_workers"}


@dataclass
class ClassifierConfig(TrainingArguments):
    """Training arguments for an image classifier, with labels: teachers and supervised students.

    They differ from transformers' [`~transformers.TrainingArguments`] in the defaults: the fastest correct precision of
    the device, batches of 256, which batch statistics need, and no wait for the device at each step. A process trains
    on one GPU; `accelerate launch` takes several.

    Raises:
        ValueError: An option is out of range, or one that means nothing here, such as `label_smoothing_factor`.
    """

    bf16: bool | None = HfArg(
        default=None,
        help="Use bfloat16 autocast. Default: what `accelerate` is set to, or where the device has it in hardware; "
        "not if `fp16` is on. False trains in float32.",
    )
    per_device_train_batch_size: int = HfArg(default=256, help="Images in a batch on each device.")
    per_device_eval_batch_size: int = HfArg(
        default=256,
        help="Images in a batch in evaluation. Under batch statistics the accuracy depends on it, and grows up to "
        "about 256.",
    )
    logging_steps: float = HfArg(default=50, help="Steps between two log entries, or a share of all steps if below 1.")
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Hide NaN and infinite losses in the log. Waits for the device at each step."
    )
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Look for parameters without gradient at each step of distributed training."
    )
    remove_unused_columns: bool = HfArg(
        default=False, help="Has to stay false: the collator of the images takes the columns that are needed."
    )

    def __post_init__(self):
        self._check_numbers()
        on_cpu = self.use_cpu or not torch.accelerator.is_available()  # type: ignore[has-type]
        fp16: bool = self.fp16  # type: ignore[has-type]
        in_float32 = self.bf16 is False and not fp16
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # which `accelerate launch` always sets
        if self.bf16 is None and not fp16 and launched != "no":
            self.bf16, self.fp16 = launched == "bf16", launched == "fp16"
        elif self.bf16 is None:
            self.bf16 = not fp16 and (_cpu_has_bf16() if on_cpu else is_torch_bf16_gpu_available())
        # transformers takes bf16 on a machine without accelerator only where the arguments name the CPU.
        self.use_cpu = on_cpu
        # transformers would choose the loss, which is reported under both kinds of statistics here.
        self.metric_is_default = self.metric_for_best_model is None and (  # type: ignore[has-type]
            self.load_best_model_at_end or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        )
        if self.metric_is_default:
            self.metric_for_best_model = self._default_metric
        if self.metric_for_best_model is not None and self.greater_is_better is None:  # type: ignore[has-type]
            self.greater_is_better = not self.metric_for_best_model.endswith(("loss", "kl"))
        super().__post_init__()
        if in_float32:
            self.mixed_precision = "no"  # transformers would take what accelerate is set to
        for name, advice in {
            "label_smoothing_factor": "the losses have none; leave it out",
            "remove_unused_columns": "the collator takes what the model needs; leave it out",
            "neftune_noise_alpha": "it is for the embeddings of texts; leave it out",
            "auto_find_batch_size": "batch statistics go by the size; lower per_device_train_batch_size until it fits",
            "fp16_full_eval": "models are evaluated as they will be deployed, in float32; leave it out",
            "bf16_full_eval": "models are evaluated as they will be deployed, in float32; leave it out",
        }.items():
            if getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}: {advice}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: BatchNorm cannot take statistics of fewer than 2 images. Use "
                    "256 where it fits, and at least 2."
                )

    def _check_numbers(self) -> None:
        """Refuse what would silently count as something else: the text 'false' as true, 0 steps as no limit."""
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name, None)
            if isinstance(value, str) and {*(typing.get_args(hint) or [hint])} <= NUMBERS:
                raise ValueError(f"{name} is the text {value!r}: give it without the quotation marks.")
            # An infinite norm is one that no gradient exceeds.
            if isinstance(value, float) and not (math.isfinite(value) or (name, value) == ("max_grad_norm", math.inf)):
                raise ValueError(f"{name} is {value}: use a finite number.")
            if name in ABOVE_ZERO and value is not None and value <= 0:
                raise ValueError(f"{name} is {value}: use a number above 0.")
            if name in NOT_NEGATIVE and value is not None and value < 0:
                raise ValueError(f"{name} is {value}: use 0 or more.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps is {self.max_steps}: use at least 1, or leave it out to train in epochs.")

    _default_metric = "batch_accuracy"

    @property
    def n_gpu(self) -> int:
        """The number of GPUs of this process, one at most: over several `nn.DataParallel` would split the batches."""
        return min(super().n_gpu, 1)


@dataclass
class NoiseKDConfig(ClassifierConfig):
    """Training arguments of [`NoiseKDTrainer`]: those of [`ClassifierConfig`], and some for the noise.

    The default length is the authors': 200 epochs of 196 batches of 256 noise images; `max_steps` shortens it. The
    noise is structured and small at first, which teaches faster than the authors' white noise, and the temperature is
    4. [`NoiseKDConfig.paper`] gives their setting.

    Raises:
        ValueError: An option is out of range; the message says what to use instead.
    """

    init_student: str = HfArg(
        default="teacher",
        help="How a student given by its timm name is initialised: 'teacher', from the teacher as far as the layers of "
        "the two correspond, or 'random'.",
        metadata={"choices": ["random", "teacher"]},
    )
    model_init_kwargs: dict | None = HfArg(  # noqa: RUF009 - HfArg makes a field
        default=None, help="What timm builds a student of that name with, such as `width=32 drop_path_rate=0.1`."
    )
    keep: float | None = HfArg(
        default=None,
        help="Without a student: cut the teacher itself, a timm model, to this share of its multiply-adds, between 0 "
        "and 1.",
    )
    max_macs: float | None = HfArg(
        default=None,
        help="Without a student: cut the teacher itself, a timm model, to so many multiply-adds for an image, such as "
        "40M, or, below 1, to this share of them.",
    )
    min_side: float = HfArg(
        default=0.75,
        help="With keep or max_macs, and given images of 64 pixels or more, the student may also take smaller ones, "
        "down to this share of their sides, where that changes the predictions less than a cut. 1 turns it off.",
    )
    max_params: float | None = HfArg(
        default=None,
        help="Without a student: cut the teacher itself, a timm model, to so many parameters, such as 180k or 2M, or, "
        "below 1, to this share of them.",
    )
    loss_type: str = HfArg(
        default="kl",
        help="Distance between the student's and the teacher's predictions: 'kl' (times the squared temperature) or "
        "'soft_cross_entropy' (the paper's).",
        metadata={"choices": sorted(LOSSES)},
    )
    temperature: float = HfArg(
        default=4.0, help="Both models' logits are divided by it before the softmax. Above 0; the paper's is 1."
    )
    noise: str = HfArg(
        default="structured",
        help="Noise to train on: 'structured', 'white' (the paper's), or names with weights, such as "
        "'dead_leaves:3,spectrum:1|cutmix:0.5', in which augmentations with their probabilities follow the '|'. "
        "Noises: white, low_resolution, spectrum, fractal and dead_leaves; augmentations: cutmix and mirror. "
        "'structured' stands alone: dead_leaves, small at first.",
    )
    noise_std: float | None = HfArg(
        default=None,
        help="Standard deviation of the noise, in the units of the teacher's input. Default: 1, or 0.25 for a "
        "teacher of pixels in [0, 1].",
    )
    resolutions: str | None = HfArg(
        default=None,
        help="Sizes of the noise images, relative to the full size, with their shares of the steps, in this "
        "order, such as '0.5:0.6,0.75:0.25,1:0.15'; no side gets below 16 pixels. Default: that for structured "
        "noise, a student with random weights and a teacher with batch statistics, and else full size.",
    )
    match_features: bool = HfArg(
        default=True,
        help="Where the student is initialised from its teacher, also train it on the teacher's features at the ends "
        "of stages.",
    )
    teacher_statistics: float | None = HfArg(
        default=None,
        help="What the teacher's BatchNorm layers normalise noise by, in [0, 1]: 1 is the batch at hand, as in the "
        "paper, 0 what they store of its training images, and between are moments mixed of both. Default: 1, or 0 "
        "for given images whose statistics spoil it. A teacher without BatchNorm is used as it is.",
    )
    batch_norm_fraction: float = HfArg(
        default=1.0,
        help="Share of the teacher's BatchNorm layers that normalise by the batch at hand, in [0, 1]. 0 is the "
        "ordinary distillation that fails on noise.",
    )
    steps_per_epoch: int = HfArg(
        default=196, help="Noise batches that count as one epoch. 196 x 256 is CIFAR-10's 50,000 images."
    )
    input_size: list[int] | None = HfArg(  # noqa: RUF009 - HfArg makes a field
        default=None, help="Channels, height and width of the noise images. Default: what the teacher declares."
    )
    num_calibration_images: int = HfArg(
        default=256,
        help="Before the training so many images are made without data: noise that is moved until the teacher's "
        "BatchNorm layers see the statistics that they store. A cut is repaired and trained on them, too, and in the "
        "end the student's running statistics are re-estimated on them. 0 keeps those of the training noise.",
    )
    max_hours: float | None = HfArg(
        default=None,
        help="In place of max_steps: train as long as all ends in so many hours, from what a step is measured to take. "
        "Batches are halved, down to 64 images, where there would be fewer than 200 steps.",
    )
    eval_noise_batches: int | None = HfArg(
        default=None,
        help="Held-out noise batches to evaluate on where there is no evaluation data set. Default: 8, or fewer where "
        "the images are large.",
    )
    num_train_epochs: float = HfArg(default=200.0, help="Epochs to train, of `steps_per_epoch` batches.")
    learning_rate: float | None = HfArg(
        default=None,
        help="Peak learning rate. Default: 1e-2, or 3e-3 for a student initialised from its teacher or trained before, "
        "or 3e-4 for one that keeps its statistics.",
    )
    lr_scheduler_type: str = HfArg(default="linear", help="Learning-rate schedule.")
    hub_strategy: str = HfArg(default="end", help="When to push with `push_to_hub`: at the end alone.")
    hub_overwrite: bool = HfArg(
        default=False,
        help="Replace another model in the repository that is pushed to. One of this package is always replaced.",
    )
    warmup_steps: float = HfArg(default=0.1, help="Steps of linear warm-up, or a share of all steps if below 1.")

    _default_metric = "batch_agreement"

    def __post_init__(self):
        super().__post_init__()
        if self.hub_strategy != "end":
            raise ValueError(f"hub_strategy is {str(self.hub_strategy)!r}: a student is pushed at the end, use 'end'.")
        if self.init_student not in ("random", "teacher"):
            raise ValueError(f"init_student is {self.init_student!r}: use 'teacher' or 'random'.")
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type is {self.loss_type!r}: use one of {', '.join(sorted(LOSSES))}.")
        for name in ("batch_norm_fraction", "teacher_statistics", "min_side"):
            if (share := getattr(self, name)) is not None and not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}: use a share between 0 and 1.")
        for name in ("noise", "resolutions"):
            if not isinstance(value := getattr(self, name), str | None):
                raise ValueError(f"{name} is {value!r}: use a text here, or pass a NoiseDataset as train_dataset.")
        parse_noise(self.noise)
        if self.resolutions is not None:
            parse_resolutions(self.resolutions)
        if self.max_hours and self.max_steps > 0:
            raise ValueError(f"max_hours is {self.max_hours:g} and max_steps {self.max_steps}: give one of the two.")
        if self.max_steps > MAX_STEPS:
            raise ValueError(f"max_steps is {self.max_steps}: no more than {MAX_STEPS} steps have noise of their own.")
        if self.num_calibration_images < 0 or self.num_calibration_images == 1:
            raise ValueError(
                f"num_calibration_images is {self.num_calibration_images}: use 0 for none, or at least 2, such as 256."
            )
        if self.input_size is not None and (len(self.input_size) != 3 or min(self.input_size) < 1):
            raise ValueError(f"input_size is {self.input_size}: use channels, height and width, such as 3 32 32.")

    @property
    def limits(self) -> dict[str, Any]:
        """What the teacher is to be cut to, as far as it is given, by the names of the arguments of [`shrink`]."""
        given = {"keep": self.keep, "max_macs": self.max_macs, "max_params": self.max_params}
        return {name: limit for name, limit in given.items() if limit is not None}

    @classmethod
    def paper(cls, output_dir: str | None = None, **overrides) -> "NoiseKDConfig":
        """Build the authors' setting: Adam at 1e-3, temperature 1, and the default length and batches.

        `overrides` are options to set otherwise. The authors lowered the learning rate when the test loss stalled,
        which takes labelled test images. A cosine decay to zero stands in for that here.
        """
        setting: dict[str, Any] = {
            # AdamW without weight decay is Adam.
            "optim": "adamw_torch_fused",
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0,
            "noise": "white",
            "loss_type": "soft_cross_entropy",
            "temperature": 1.0,
            "num_calibration_images": 0,
            "init_student": "random",
            "match_features": False,
        }
        return cls(output_dir, **setting | overrides)


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware; elsewhere they are emulated and slow."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
