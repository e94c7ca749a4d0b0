"""The Hub: check first that it can be written to, upload what belongs to a model, say what went wrong."""

import functools
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HFValidationError

from hf_noisekd.files import (
    CARD_NAME,
    CLASS_BALANCE_NAME,
    CONFIG_NAME,
    CURVES_NAME,
    RECORD_NAME,
    WEIGHTS_NAME,
)

# What belongs to a model on the Hub. Training arguments, which may hold a token, checkpoints and anything else that the
# user keeps in the folder stay behind.
RELEASED_FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CARD_NAME,
    RECORD_NAME,
    CURVES_NAME,
    CLASS_BALANCE_NAME,
    "model-*.safetensors",
    "model.safetensors.index.json",
    "preprocessor_config.json",
)


class HubError(RuntimeError):
    """The Hub refused a request or could not be reached; the message says what to do."""


@functools.cache
def _api(token: str | None) -> HfApi:
    # One for all calls: it keeps the order of uploads that run in the background.
    return HfApi(token=token, library_name="hf_noisekd")


def check_hub_access(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make sure that `repo_id` exists on the Hub and can be written to, and return its full id.

    Args:
        repo_id: `organisation/name`, or a name alone for the user's own.
        token: Access token; by default the one of `hf auth login` or of `HF_TOKEN`.
        private: Whether a new repository is private; by default what the organisation says.

    Raises:
        HubError: The id has a bad form, there is no token or it cannot write, or the Hub cannot be reached.
    """
    api = _api(token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # With a token that can only read, `create_repo` is content with a repository that is there already.
        api.auth_check(repo_id, write=True)
    except Exception as error:  # of the Hub's client, and of either of the HTTP libraries below it
        raise HubError(f"Cannot push to {repo_id!r}: {hub_advice(error)}") from error
    return repo_id


def upload(folder: str | Path, repo_id: str, *, token: str | None = None, **kwargs) -> CommitInfo:
    """Upload the [`RELEASED_FILES`] of a folder.

    Args:
        folder: What to upload from.
        repo_id: Where to; it must be there.
        token: As in [`check_hub_access`].
        **kwargs: Anything else that `huggingface_hub.HfApi.upload_folder` takes.

    Raises:
        HubError: The Hub refuses or cannot be reached; the message says how to push again.
    """
    try:
        return _api(token).upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(RELEASED_FILES), **kwargs
        )
    except Exception as error:  # as above
        raise HubError(push_again(folder, repo_id, error, kwargs.get("revision"))) from error


def upload_later(
    folder: str | Path, repo_id: str, *, patterns: Sequence[str] = RELEASED_FILES, token: str | None = None, **kwargs
) -> Future:
    """Upload files of a folder as they are now, in the background and in the order of the calls.

    A copy is uploaded, so training may go on to replace or delete them.

    Args:
        folder: What to upload from.
        repo_id: Where to; it must be there.
        patterns: Names of the files, with wildcards.
        token: As in [`check_hub_access`].
        **kwargs: Anything else that `huggingface_hub.HfApi.upload_folder` takes.

    Returns:
        A future, which raises what `upload_folder` raises.
    """
    copy = tempfile.mkdtemp(prefix="noisekd-push-")
    try:
        for file in Path(folder).iterdir():
            if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copy(file, copy)
    except OSError:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    job = _api(token).upload_folder(repo_id=repo_id, folder_path=copy, run_as_future=True, **kwargs)
    job.add_done_callback(lambda _: shutil.rmtree(copy, ignore_errors=True))
    return job


def push_again(folder: str | Path, repo_id: str, error: BaseException, revision: str | None = None) -> str:
    """Return what to tell a user whose push failed."""
    branch = f" --revision {revision}" if revision else ""
    return (
        f"The push to {repo_id!r} failed: {hub_advice(error)}. Nothing is lost: the student is whole in {folder}. Push "
        f"it again with `noisekd push --model {shlex.quote(str(folder))} --repo-id {repo_id}{branch}`."
    )


def hub_advice(error: BaseException) -> str:
    """Return what the Hub's error means and what to do about it, in one line."""
    # An upload of a large file hides the answer in the cause.
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, HFValidationError):
        advice = "the id must have the form organisation/name, of letters, digits, '-', '_' and '.'"
    elif status == 401:
        advice = "there is no valid token: run `hf auth login`, or set HF_TOKEN to a token with write access"
    elif status == 403:
        advice = "the token may not write there: use one with write access to this organisation"
    elif status == 409:
        advice = "somebody else wrote to the repository at the same time: push again"
    elif status == 429:
        advice = "too many requests: wait some minutes and push again"
    elif status is not None and status >= 500:
        advice = "the Hub has a fault of its own: push again later"
    elif status == 404:
        advice = "there is no such repository or branch: make the branch first, or push to the main one"
    elif constants.HF_HUB_OFFLINE:
        advice = "HF_HUB_OFFLINE=1 forbids requests: unset it to push"
    elif status is None and type(error.__cause__ or error).__module__.startswith(("http", "builtins")):
        advice = "the connection failed: push again once the Hub can be reached"
    else:
        return " ".join(str(error).split())
    return f"{advice} ({' '.join(str(error).split())})"
