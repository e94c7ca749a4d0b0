"""The part of a trainer that pushes to the Hub: while it trains, and at the end."""

import logging
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from hf_noisekd.files import replacing_files
from hf_noisekd.release.hub import RELEASED_FILES, check_hub_access, push_again, upload, upload_later

logger = logging.getLogger(__name__)


class PushingTrainer(Trainer):
    """transformers' Trainer that pushes the student with its card, and nothing else.

    transformers' own push would upload the pickled training arguments, with the token in them, and lose the errors.
    """

    push_in_progress = PushInProgress()  # replaced with each change, so that all trainers may begin with this one

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the student's repository before the first step, or raise the `HubError` of [`check_hub_access`]."""
        if self.is_world_process_zero():
            self.hub_model_id = check_hub_access(
                self.args.hub_model_id or Path(self.args.output_dir).absolute().name,
                token=token or self.args.hub_token,
                private=self.args.hub_private_repo if private is None else private,
            )

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
        self._finish_current_push()
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.create_model_card(**kwargs)
        push = upload if blocking else upload_later
        to = {"token": token, "revision": revision or self.args.hub_revision}
        return push(self.args.output_dir, self.hub_model_id, commit_message=commit_message, **to)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.push_in_progress.is_done() and not self.args.hub_always_push:
            return
        self._report_failed_pushes()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        with replacing_files(self.args.output_dir) as staging:
            for file in Path(checkpoint_folder).iterdir():
                if any(file.match(pattern) for pattern in RELEASED_FILES):
                    shutil.copy(file, staging)
        try:
            self._start_push(checkpoint_folder)
        except Exception as error:  # of a full disk, or of anything that must not end a training
            self._warn_of_failed_push(error)

    def _start_push(self, checkpoint_folder: str) -> None:
        self.create_model_card()
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        where = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        message = f"Training in progress, {where}"
        to = {"token": self.args.hub_token, "revision": self.args.hub_revision}
        jobs = [upload_later(self.args.output_dir, self.hub_model_id, commit_message=message, **to)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            to["path_in_repo"] = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            to |= {"commit_message": f"{message}, checkpoint", "patterns": ["*"]}
            jobs.append(upload_later(checkpoint_folder, self.hub_model_id, **to))
        self.push_in_progress = PushInProgress([*self.push_in_progress.jobs, *jobs])

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Warn of the uploads that failed since the last call, and forget those that are done."""
        for job in self.push_in_progress.jobs:
            if job.done() and job.exception() is not None:
                self._warn_of_failed_push(job.exception())
        self.push_in_progress = PushInProgress([job for job in self.push_in_progress.jobs if not job.done()])

    def _warn_of_failed_push(self, error: BaseException) -> None:
        advice = push_again(self.args.output_dir, self.hub_model_id, error, self.args.hub_revision)
        logger.warning("Training goes on. %s", advice)
