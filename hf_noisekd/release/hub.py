"""The Hub: check first that it can be written to, upload what belongs to a model, say what went wrong."""

import functools
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_noisekd.files import CARD_NAME, CLASS_BALANCE_NAME, CONFIG_NAME, CURVES_NAME, RECORD_NAME, WEIGHTS_NAME

# Training arguments, which may hold a token, checkpoints and whatever else the user keeps in the folder stay behind.
RELEASED_FILES = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, RECORD_NAME, CURVES_NAME, CLASS_BALANCE_NAME]
RELEASED_FILES += ["model-*.safetensors", "model.safetensors.index.json", "preprocessor_config.json"]

# What to do about a status that the Hub answers with.
ADVICE = {
    401: "there is no valid token: run `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "the token may not write there: use one with write access to this organisation",
    404: "there is no such repository or branch: make the branch first, or push to the main one",
    409: "somebody else wrote to the repository at the same time: push again",
    429: "too many requests: wait some minutes and push again",
}


class HubError(RuntimeError):
    """The Hub refused a request or could not be reached; the message says what to do."""


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if no repository can have this id."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the id of a repository: {hub_advice(error)}.") from error


@functools.cache
def _api(token: str | None) -> HfApi:
    # One for all calls: it keeps the order of uploads that run in the background.
    return HfApi(token=token, library_name="hf_noisekd")


def check_hub_access(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Make sure that `repo_id` exists on the Hub and can be written to, and return its full id.

    `private` is of a new repository; by default the organisation decides.

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


def upload(folder: str | Path, repo_id: str, *, token: str | None = None, **kwargs) -> Any:
    """Upload the [`RELEASED_FILES`] of a folder, and return what `HfApi.upload_folder` does.

    A [`HubError`] says how to push again.
    """
    try:
        return _api(token).upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=RELEASED_FILES, **kwargs)
    except Exception as error:  # as above
        raise HubError(push_again(folder, repo_id, error, kwargs.get("revision"))) from error


def push_again(folder: str | Path, repo_id: str, error: BaseException, revision: str | None = None) -> str:
    """Return what to tell a user whose push failed."""
    branch = f" --revision {revision}" if revision else ""
    return (
        f"The push to {repo_id!r} failed: {hub_advice(error)}. Nothing is lost: the student is whole in {folder}. Push "
        f"it again with `noisekd push --model {shlex.quote(str(folder))} --repo-id {repo_id}{branch}`."
    )


def hub_advice(error: BaseException) -> str:
    """Return what the Hub's error means and what to do about it, in one line."""
    text = " ".join(str(error).split())
    # An upload of a large file hides the answer in the cause.
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, HFValidationError):
        advice = "the id must have the form organisation/name, of letters, digits, '-', '_' and '.'"
    elif status in ADVICE:
        advice = ADVICE[status]
    elif status is not None and status >= 500:
        advice = "the Hub has a fault of its own: push again later"
    elif constants.HF_HUB_OFFLINE:
        advice = "HF_HUB_OFFLINE=1 forbids requests: unset it to push"
    elif status is None and type(error.__cause__ or error).__module__.startswith(("http", "builtins")):
        advice = "the connection failed: push again once the Hub can be reached"
    else:
        return text
    return f"{advice} ({text})"
