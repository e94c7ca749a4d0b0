"""Features at the ends of stages, in which a cut network is compared with its teacher during training.

As in FitNets (Romero et al., ICLR 2015), without the layers between that a network of another kind needs: the student
has the teacher's channels, or some of them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_noisekd.models.classifier import bare_model
from hf_noisekd.shrinking.blocks import Place, stages_of
from hf_noisekd.shrinking.repair import Cut, pairs_of

POOLING = "global_pool"  # timm's name of the layer in its convolutional networks
WEIGHT_OF_LOGITS = 0.1


class StageFeatures:
    """Compares what two networks have at the ends of their stages, and what they pool.

    It is of their last forward passes within this context. `cut` is how the student was cut out of the teacher.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, cut: Cut):
        student, teacher = bare_model(student), bare_model(teacher)
        self._kept = [torch.tensor(channels) for channels in sorted({tuple(one) for one in cut.kept.values()})]
        ends = {Place(stage, keys[-1]).name for stage, keys in stages_of(teacher).items()}
        self._pairs = [pair for pair in pairs_of(teacher, cut.removed) if pair.teacher in ends]
        self._models = {"student": student, "teacher": teacher}
        self._seen: dict[tuple[str, str], torch.Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "StageFeatures":
        for role, model in self._models.items():
            modules = dict(model.named_modules())
            for pair in self._pairs:
                if end := modules.get(getattr(pair, role)):
                    self._hooks.enter_context(end.register_forward_hook(self._keeper(role, pair.teacher)))
            for name, module in modules.items():
                if name.rpartition(".")[2] == POOLING:
                    note = self._keeper(role, POOLING)
                    self._hooks.enter_context(module.register_forward_pre_hook(lambda _, x, note=note: note(_, x, *x)))
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self._seen.clear()

    def _keeper(self, role: str, name: str) -> Any:
        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if torch.is_tensor(output):
                self._seen[role, name] = output

        return keep

    def loss(self, loss_of_logits: torch.Tensor) -> torch.Tensor:
        """Return the squared errors of the features, each over its variance, plus a tenth of the loss of the logits.

        It is the latter alone where the features do not correspond.
        """
        seen, self._seen = self._seen, {}
        goals: dict[int, tuple[str, torch.Tensor]] = {}
        for (role, name), features in seen.items():
            if role == "teacher":
                goals.setdefault(id(features), (name, features))  # what is pooled may be the end of the last stage
        errors = [self._error(seen.get(("student", name)), goal) for name, goal in goals.values()]
        found = [error for error in errors if error is not None]
        return sum(found) + WEIGHT_OF_LOGITS * loss_of_logits if found else loss_of_logits

    def _error(self, features: torch.Tensor | None, goal: torch.Tensor) -> torch.Tensor | None:
        if features is None or features.dim() != goal.dim():
            return None
        features, goal = features.float(), goal.float()
        wanted: Sequence[torch.Tensor] = [goal]
        if features.shape[1] != goal.shape[1]:  # of layers with so many channels, the one that comes the closest
            fitting = [one for one in self._kept if len(one) == features.shape[1] and one.max() < goal.shape[1]]
            wanted = [goal[:, channels.to(goal.device)] for channels in fitting]
        errors = [F.mse_loss(features, one) / goal.var() for one in wanted if one.shape == features.shape]
        return min(errors) if errors else None
