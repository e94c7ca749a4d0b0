"""What is known of a training run, as plain data that its results file, its student's folder and its card share.

A record is a mapping of this schema; what is not known is left out:

- `model`: `architecture`; `library`, which can build it: `timm`, `transformers` or else `torch`; `parameters`;
  `input_size`; of a distilled student `label_names`.
- `steps` of training, `seconds` from the first to the last, with the evaluations in between, and `images_per_second`
  over these seconds. A resumed run has no `seconds`. `processes`: how many trained.
- `evaluations`: a list, for each data set its name as `dataset`, its `split`, the number of `images`, the `batch_size`,
  the `precision`, the `step` after which, the `log_prefix` of its entries in the curve, and under `running` and `batch`
  what [`evaluate`] measured: `accuracy` and so on in percent, `loss` and `kl` in nats. On noise there are only
  `agreement` with the teacher and `kl`.
- `curve`: the training log, entries with `step`.
- `noisekd`: of a distilled student, see [`noisekd_section`], and `class_frequencies`: the teacher's mean answer to the
  training noise, a probability for each class; of a resumed run, to that since then.
- `machine`: processor, cores, accelerator; `versions`: Python and the packages that matter; `command`.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from hf_noisekd.models.classifier import architecture_of, declared_input_size, pretrained_cfg_of


def describe_model(model: nn.Module) -> dict:
    """Return the part `model` of a record."""
    description = {"architecture": architecture_of(model), "library": "torch"}
    if pretrained_cfg_of(model).get("architecture"):
        description["library"] = "timm"
    elif isinstance(model, PreTrainedModel):
        description["library"] = "transformers"
    description["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    input_size = declared_input_size(model)
    if input_size is not None:
        description["input_size"] = list(input_size)
    return description


def current_evaluations(evaluations: Sequence[Mapping], step: int) -> list[dict]:
    """Return the evaluations that tell how good a model is now, one for each data set.

    Those made after the training count before those made in it, and later ones before earlier ones.

    Args:
        evaluations: All that were made, in order, each with `in_training` beside the entries of a record.
        step: The step that the weights are of: what was measured in the training after it does not count.
    """
    current = {}
    for in_training in (True, False):
        for evaluation in evaluations:
            if evaluation["in_training"] == in_training and evaluation["step"] <= step:
                current[evaluation["dataset"]] = evaluation
    return [{key: value for key, value in entry.items() if key != "in_training"} for entry in current.values()]
