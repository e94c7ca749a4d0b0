"""Which families of timm can be cut down, and read again by everything: a small member of each, with random weights.

    python recipes/families.py    # a quarter of an hour on a CPU

Beyond the paper. Each is cut to half its multiply-adds, as by `noisekd distill --keep 0.5`, saved, and loaded by
timm and by transformers, whose logits must be the same; then exported to ONNX and run by onnxruntime. Groups of
channels that torch-pruning cannot follow, or takes for others, are left alone. A network none of whose tensors is
narrowed is one that is as well off without blocks, or one that has no other groups. Errors are those of logits for 64
noise images, relative to their spread, as cut and repaired on 64 others.
"""

import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch
from harness.cuts import cut_and_repaired, groups_left_alone
from harness.onnx_files import exported_logits
from harness.results import Results, recipe_parser
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoModelForImageClassification

from hf_noisekd import recalibrate_batch_norm, save_model

PRESETS = {
    "cpu": {
        "keep": 0.5,
        "side": 64,
        "members": [
            "resnet26", "ecaresnet26t", "resnetv2_50", "regnety_002", "gernet_s", "mobilenetv2_050", "efficientnet_b0",
            "mobilenetv3_small_050", "hardcorenas_a", "ghostnet_050", "repghostnet_050", "repvit_m1", "densenet121",
            "dla34", "vgg11_bn", "cspresnet50", "ese_vovnet19b_dw", "hgnet_tiny", "selecsls42b", "xception41",
            "hrnet_w18_small", "tresnet_m", "legacy_seresnet18", "starnet_s1", "convnext_atto", "skresnet18",
            "fasternet_t0", "res2net50_26w_4s", "mobileone_s0", "nf_resnet26", "rexnet_100", "mixnet_s", "resnest14d",
        ],
    }
}  # fmt: skip


def main() -> None:
    """Cut all members, and print the table."""
    parser = recipe_parser(__doc__, "families", PRESETS)
    parser.add_argument("--members", nargs="+", metavar="NAME", help="timm names; default: the preset's")
    options = parser.parse_args()
    preset = PRESETS[options.preset] | ({"members": options.members} if options.members else {})
    results = Results("families", options, preset)
    warnings.filterwarnings("ignore")
    rows = []
    for name in preset["members"]:
        start = time.perf_counter()
        rows.append({"family": family_of(name), "member": name} | cut_and_read(name, preset["keep"], preset["side"]))
        rows[-1]["seconds"] = round(time.perf_counter() - start)
        results.measure("families", rows)
    results.print_table()


def family_of(name: str) -> str:
    """Return the module of timm that has a network."""
    return timm.models.model_entrypoint(name).__module__.rpartition(".")[2]


def cut_and_read(name: str, keep: float, side: int) -> dict:
    """Cut a network, and return what of it is left, and which libraries read it as it is."""
    torch.manual_seed(0)
    teacher = timm.create_model(name, num_classes=10).eval()
    for layer in teacher.modules():
        if isinstance(layer, _BatchNorm):  # fresh ones would hide a wrong channel
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
    size = (3, side, side)
    images, others = torch.randn(2, 64, *size)
    if any(isinstance(layer, _BatchNorm) for layer in teacher.modules()):
        recalibrate_batch_norm(teacher, images)  # fresh statistics fit no image
    row: dict = {"multiply-adds (%)": None, "groups left alone": "", "cut": "", "built as": "", "read by": ""}
    row |= {"error (%)": None, "repaired (%)": None}
    row["groups left alone"] = groups_left_alone(teacher, size)
    try:
        student, start, errors = cut_and_repaired(teacher, keep, images, others)
    except Exception as error:  # the others are to be tried all the same
        return row | {"cut": f"{type(error).__name__}: {str(error).partition(':')[0]}"}
    row |= {"multiply-adds (%)": 100 * start.macs, "built as": student.pretrained_cfg["architecture"]}
    row["cut"] = f"{start.cut} of {start.tensors} tensors narrowed, {len(start.removed_blocks)} blocks left out"
    row |= {"error (%)": errors[0], "repaired (%)": errors[1]}
    return row | {"read by": ", ".join(readers(student, images[:2]))}


def readers(student: nn.Module, images: torch.Tensor) -> list[str]:
    """Return the libraries that give the logits of a student that was saved."""
    found = []
    # The size that the file is exported for.
    student.pretrained_cfg["input_size"] = tuple(images.shape[1:])
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        expected = student(images)
        save_model(student, folder)
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if torch.equal(again(images), expected):
            found.append("timm")
        logits = AutoModelForImageClassification.from_pretrained(folder).eval()(images).logits
        if torch.allclose(logits, expected, rtol=1e-4, atol=1e-4):
            found.append("transformers")
        logits = exported_logits(student, Path(folder) / "student.onnx", images)
        if torch.allclose(logits, expected, rtol=1e-2, atol=1e-3):
            found.append("onnxruntime")
    return found


if __name__ == "__main__":
    main()
