"""Which networks can teach: a small member of each model file of timm, and of each kind of CNN in transformers.

    python recipes/teachers.py    # about 20 minutes on a CPU

Beyond the paper. Of a model file the smallest networks are taken: one with BatchNorm and one without, if there are such
of up to 150 million parameters. Each, with random weights, is saved and loaded as a teacher, is used for one step of
structured noise, and must not have changed; its student is saved and loaded. "on the batch" is a teacher whose
BatchNorm layers normalise noise by the batch at hand, "as it is" one that has none.
"""

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
import transformers
from harness.results import Results, recipe_parser
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_noisekd import NoiseKDConfig, NoiseKDTrainer, load_teacher, save_model

# Small members of transformers' CNNs, by the name of the kind, and the side of their images.
SMALL = {"num_labels": 10}
TRANSFORMERS: dict[str, tuple[dict, int]] = {
    "Bit": ({"embedding_size": 16, "hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 1, 1], "num_groups": 8}, 64),
    "ConvNext": ({"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "image_size": 64}, 64),
    "ConvNextV2": ({"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "image_size": 64}, 64),
    "Cvt": ({"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 2, 3]}, 64),
    "EfficientNet": ({"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 64, "hidden_dim": 320}, 64),
    "FocalNet": ({"embed_dim": 16, "depths": [1, 1, 1, 1], "image_size": 64}, 64),
    "HGNetV2": ({}, 64),
    "Levit": ({"image_size": 224, "hidden_sizes": [32, 64, 64], "num_attention_heads": [2, 4, 4]}, 224),
    "MobileNetV1": ({"depth_multiplier": 0.25, "image_size": 64}, 64),
    "MobileNetV2": ({"depth_multiplier": 0.35, "image_size": 64}, 64),
    "MobileViT": ({"image_size": 64, "hidden_sizes": [16, 32, 32], "neck_hidden_sizes": [8] + [16] * 6}, 64),
    "MobileViTV2": ({"image_size": 64, "width_multiplier": 0.5}, 64),
    "PoolFormer": ({"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}, 64),
    "RegNet": ({"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "groups_width": 8}, 64),
    "ResNet": ({"embedding_size": 16, "hidden_sizes": [32, 32, 32, 32], "depths": [1, 1, 1, 1]}, 64),
    "SwiftFormer": ({"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 32, 64], "image_size": 64}, 64),
    "TextNet": ({"image_size": 64}, 64),
}  # fmt: skip
PRESETS: dict[str, dict] = {"cpu": {"transformers": sorted(TRANSFORMERS)}}
BATCH_SIZE = 4
# No member of a model file with more parameters is small enough to be tried.
MOST_PARAMETERS = 150e6
NOT_TRIED = "not tried: no member that is small enough can be built"


def main() -> None:
    """Try all of them, and print the table."""
    parser = recipe_parser(__doc__, "teachers", PRESETS)
    parser.add_argument("--files", nargs="+", metavar="NAME", help="timm's model files, or kinds in transformers")
    options = parser.parse_args()
    results = Results("teachers", options, PRESETS[options.preset])
    warnings.filterwarnings("ignore")
    members = smallest_members(options.files)
    untried = {"member": "", "normalisation": "", "asked": "", "refused": NOT_TRIED, "seconds": 0}
    rows = [{"file": file} | untried for file, small in members.items() if not small]
    for file, member, build, input_size in candidates(options.files, members):
        start = time.perf_counter()
        rows.append({"file": file, "member": member} | teach_once(build, input_size))
        rows[-1]["seconds"] = round(time.perf_counter() - start)
        results.measure("teachers", rows)
    results.print_table()


def candidates(
    files: Collection[str] | None, members: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, Callable[[], nn.Module], list[int] | None]]:
    """Yield the file or kind of each network, its name, how it is built, and its input size, unless timm says it.

    Args:
        files: Those that are wanted; None for all.
        members: Of timm, as of [`smallest_members`].
    """
    for kind, (config, side) in TRANSFORMERS.items():
        if files is None or kind in files:
            name = f"{kind}ForImageClassification"
            yield f"transformers {kind}", name, partial(transformers_model, kind, config), [3, side, side]
    for file, small in members.items():
        for member in small:
            yield file, member, partial(timm.create_model, member, num_classes=10), None


def transformers_model(kind: str, config: dict) -> nn.Module:
    """Build a network of transformers with random weights."""
    cls = getattr(transformers, f"{kind}ForImageClassification")
    return cls(getattr(transformers, f"{kind}Config")(**SMALL | config))


def smallest_members(files: Collection[str] | None) -> dict[str, list[str]]:
    """Return the smallest networks of each model file of timm, or of `files`: with BatchNorm, and without."""
    found: dict[str, dict[bool, tuple[int, str]]] = {}
    for name in timm.list_models():
        package, *_, file = timm.models.model_entrypoint(name).__module__.split(".")
        if package != "timm" or file not in (files or [file]):
            continue
        sizes = found.setdefault(file, {})
        try:
            with torch.device("meta"):
                model = timm.create_model(name)
        except (RuntimeError, NotImplementedError):  # what reads its own weights cannot be built without any
            continue
        size = (sum(parameter.numel() for parameter in model.parameters()), name)
        if size[0] > MOST_PARAMETERS:
            continue
        has_batch_norm = any(isinstance(layer, _BatchNorm) for layer in model.modules())
        sizes[has_batch_norm] = min(size, sizes.get(has_batch_norm, size))
    return {file: [name for _, name in sorted(sizes.values())] for file, sizes in sorted(found.items())}


def teach_once(build: Callable[[], nn.Module], input_size: list[int] | None) -> dict:
    """Teach a tiny student for one step, and return how the teacher was used, or why it was refused."""
    torch.manual_seed(0)
    row = {"normalisation": "", "asked": "", "refused": ""}
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = build()
            row["normalisation"] = normalisation(model)
            save_model(model, Path(folder) / "teacher")
            teacher = load_teacher(Path(folder) / "teacher")
            before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
            args = NoiseKDConfig(
                str(Path(folder) / "student"),
                max_steps=1,
                per_device_train_batch_size=BATCH_SIZE,
                num_calibration_images=0,
                resolutions="1",
                init_student="random",
                input_size=input_size,
                disable_tqdm=True,
            )
            trainer = NoiseKDTrainer("test_resnet", teacher, args)
            trainer.train()
            trainer.save_model()
            changed = [name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, before[name])]
            again = load_teacher(args.output_dir).state_dict()
            lost = [name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, again[name])]
            if changed or lost:
                raise ValueError(f"the teacher changed in {changed}, the student lost {lost}")
            row["asked"] = "on the batch" if trainer.teacher.weight_of_batch else "as it is"
        except Exception as error:  # the others are to be tried all the same
            row["refused"] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return row


def normalisation(model: nn.Module) -> str:
    """Return the kinds of a network's normalisation layers, the most frequent first."""
    kinds = Counter(
        type(module).__name__
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and list(module.parameters(recurse=False))
    )
    return ", ".join(kind for kind, _ in kinds.most_common()) or "none"


if __name__ == "__main__":
    main()
