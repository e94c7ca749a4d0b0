"""Features in front of the pooling, in which a cut network is compared with its teacher during training."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_noisekd.models.classifier import bare_model

POOLING = "global_pool"  # timm's name of the layer in its convolutional networks
WEIGHT_OF_LOGITS = 0.1


class PooledFeatures:
    """Compares what two networks pool in their last forward passes within this context.

    The student was cut out of the teacher.
    `kept` has, by the names of the student's narrowed layers, the channels of the teacher that they kept.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, kept: Mapping[str, Sequence[int]]):
        self._kept = [torch.tensor(channels) for channels in kept.values()]
        self._models = {"student": student, "teacher": teacher}
        self._seen: dict[str, torch.Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "PooledFeatures":
        for role, model in self._models.items():
            for name, module in bare_model(model).named_modules():
                if name.rpartition(".")[2] == POOLING:
                    keep: Any = lambda _, args, role=role: self._seen.__setitem__(role, args[0])  # noqa: E731
                    self._hooks.enter_context(module.register_forward_pre_hook(keep))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._seen.clear()

    def loss(self, loss_of_logits: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of the features, over their variance, plus a tenth of the loss of the logits.

        It is the latter alone where nothing is pooled, or the features do not correspond.
        """
        features, goal = (self._seen.pop(role, None) for role in ("student", "teacher"))
        if features is None or goal is None:
            return loss_of_logits
        features, goal = features.float(), goal.float()
        if features.shape[1] == goal.shape[1]:
            wanted = [goal]
        else:  # of several layers with so many channels, the one whose channels these are comes the closest
            fitting = [one for one in self._kept if len(one) == features.shape[1] and one.max() < goal.shape[1]]
            wanted = [goal[:, channels.to(goal.device)] for channels in fitting]
        errors = [F.mse_loss(features, one) / goal.var() for one in wanted if one.shape == features.shape]
        return min(errors) + WEIGHT_OF_LOGITS * loss_of_logits if errors else loss_of_logits
