"""Training with labels: teachers, and the supervised students that a distilled one is compared with."""

import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from hf_noisekd.batches import collate_images
from hf_noisekd.models.batch_norm import has_batch_norm
from hf_noisekd.models.classifier import compute_logits, declared_input_size
from hf_noisekd.models.loading import load_student
from hf_noisekd.models.saving import check_can_be_saved
from hf_noisekd.training.base import BaseTrainer
from hf_noisekd.training.checks import check_bare, check_last_batch, check_trainable
from hf_noisekd.training.config import ClassifierConfig


class ClassifierTrainer(BaseTrainer):
    """The [`BaseTrainer`] that minimises the cross-entropy with labels.

    Args:
        model: The classifier, or anything [`load_student`] takes.
        args: Training arguments.
        data_collator: Collator of the images.
        train_dataset: Images with labels; see [`collate_images`] for the forms.
        eval_dataset: Likewise, or a mapping of several by name.
        **kwargs: As for [`BaseTrainer`].

    Raises:
        ValueError: The arguments ask for a push, or the model cannot be trained on these images, in these processes,
            or saved.
    """

    def __init__(
        self,
        model: str | nn.Module,
        args: ClassifierConfig | None = None,
        data_collator=collate_images,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        **kwargs,
    ):
        args = ClassifierConfig() if args is None else args
        if args.push_to_hub:
            # transformers would upload the pickled training arguments, with the token in them.
            raise ValueError(
                f"{type(self).__name__} does not push: train with push_to_hub=False, save the model, and push it with "
                "`noisekd push --model FOLDER --repo-id ORGANISATION/NAME`."
            )
        set_seed(args.seed)  # before a model given by name gets its random weights
        model = load_student(model)
        check_bare(model, "model")
        if train_dataset is not None:
            check_trainable(model)
            if has_batch_norm(model):
                check_last_batch(train_dataset, args)
        check_can_be_saved(model, declared_input_size(model))
        super().__init__(model, args, data_collator, train_dataset, eval_dataset, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the mean cross-entropy of a batch with `pixel_values` `[B, C, H, W]` and `labels` `[B]`."""
        logits = compute_logits(model, inputs["pixel_values"])
        loss = F.cross_entropy(logits.float(), inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss
