"""The part of a trainer that pushes the student to the Hub, once it is trained."""

from collections.abc import Callable
from pathlib import Path

from transformers import Trainer

from hf_noisekd.record.schema import Record
from hf_noisekd.release.card import write_model_card
from hf_noisekd.release.hub import check_hub_access, upload
from hf_noisekd.training.config import NoiseKDConfig


class PushingTrainer(Trainer):
    """transformers' Trainer that pushes the student with its card, and nothing else.

    transformers' own push would upload the pickled training arguments, with the token in them, and lose the errors.
    """

    args: NoiseKDConfig
    record: Callable[[], Record]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the student's repository before the first step, or raise the `HubError` of [`check_hub_access`]."""
        if self.is_world_process_zero():
            self.hub_model_id = check_hub_access(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo if private is None else private,
                revision=self.args.hub_revision,
                hub_overwrite=self.args.hub_overwrite,
            )

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        **kwargs,
    ) -> None:
        """Write the student's card, with its last evaluation and figures, and its record to the output folder.

        Args:
            language: Language of the class names.
            license: Licence of the student; by default the teacher's, where it is known.
            tags: Tags beside the usual ones.
            model_name: Title of the card.
            **kwargs: Not used; scripts for transformers' Trainer give them.
        """
        if not self.is_world_process_zero():
            return
        record = self.record()
        record.repo_id = self.hub_model_id
        record.language, record.license, record.title = language, license, model_name
        record.tags = [tags] if isinstance(tags, str) else tags
        write_model_card(record, self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the student with its card, and push both to the Hub.

        The arguments are those of transformers' `Trainer.push_to_hub`, and of `create_model_card`.

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
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        return upload(
            self.args.output_dir,
            self.hub_model_id,
            token=token,
            revision=revision or self.args.hub_revision,
            hub_overwrite=self.args.hub_overwrite,
            commit_message=commit_message,
            run_as_future=not blocking,
        )
