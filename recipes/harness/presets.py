"""Networks, steps and arguments that the recipes share."""

from hf_noisekd import NoiseKDConfig

# The five rows of the paper's Table 1: how the student is taught, the most telling first.
ROWS = {
    "noise-batch": "noise, batch-statistics teacher",
    "noise-running": "noise, running-statistics teacher",
    "supervised": "images and labels, no teacher",
    "images-running": "images, running-statistics teacher",
    "images-batch": "images, batch-statistics teacher",
}

# The row whose first student a recipe pushes to the Hub.
RELEASED_ROW = "noise-batch"

# Teacher and students on CIFAR-10 in all recipes that use it. `cpu` is for two cores: small networks, and 1,500 steps
# of noise at a higher rate. `paper` has the authors' networks and, for students that a teacher teaches, their steps.
CIFAR10 = {
    "cpu": {
        "dataset": "uoft-cs/cifar10",
        "teacher": "resnet18_cifar",
        "students": ["resnet10_cifar"],
        "model_args": {"width": 32, "stem_stride": 2},
        "supervised": {"num_train_epochs": 10},
        "distillation": {"max_steps": 1500, "learning_rate": 3e-3, "warmup_steps": 0.1},
    },
    "paper": {
        "dataset": "uoft-cs/cifar10",
        "teacher": "resnet34_cifar",
        "students": ["resnet18_cifar", "mobilenetv2_cifar", "resnet34_cifar"],
        "supervised": {"num_train_epochs": 20, "weight_decay": 0.2},
        "distillation": {"max_steps": 39_200},
    },
}

# Teachers and students on which noises are compared.
NOISE_PAIRS = {
    "cpu": CIFAR10["cpu"],
    "cpu-wrn": CIFAR10["cpu"] | {"teacher": "wide_resnet16_2_cifar"},
}

# Teachers without BatchNorm.
NO_BATCH_NORM = {
    "cpu-convnext": CIFAR10["cpu"]
    | {
        "teacher": "convnext_atto",
        # On images of 32 pixels: small patches and kernels, and layer scales that need no epochs to grow.
        "teacher_args": {"patch_size": 2, "kernel_sizes": 3, "ls_init_value": 0.1, "drop_path_rate": 0.1},
        "supervised": {
            "num_train_epochs": 14,
            "learning_rate": 3e-3,
            "weight_decay": 0.1,
            "per_device_train_batch_size": 128,
        },
    },
    "cpu-groupnorm": CIFAR10["cpu"]
    | {"teacher_args": CIFAR10["cpu"]["model_args"] | {"norm_groups": 8}, "supervised": {"num_train_epochs": 8}},
}

# What `noisekd distill` does by itself, where it differs from the paper's setting.
DISTILL_DEFAULTS = {
    name: NoiseKDConfig.__dataclass_fields__[name].default
    for name in (
        "noise",
        "loss_type",
        "temperature",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "max_grad_norm",
        "match_features",
    )
}

# Sizes that structured noise has by default, for runs in which the trainer would choose others.
STRUCTURED_SIZES = "0.5:0.6,0.75:0.25,1:0.15"


def with_cpu_steps(max_steps: int) -> dict[str, dict]:
    """Return [`CIFAR10`] with another number of distillation steps in `cpu`, for recipes of many runs."""
    cpu = CIFAR10["cpu"]
    return CIFAR10 | {"cpu": cpu | {"distillation": cpu["distillation"] | {"max_steps": max_steps}}}


# Training with labels: AdamW with a linear warm-up and decay, on crops and mirror images. Nothing looks at the test
# images, as the authors' own learning-rate schedule did.
SUPERVISED = {
    "learning_rate": 3e-3,
    "weight_decay": 0.05,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.2,
}
