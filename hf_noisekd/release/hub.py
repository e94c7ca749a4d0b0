"""The Hub: check write access first, upload the files of a model, and explain errors."""

import functools
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_noisekd.files import CARD_NAME, CLASS_BALANCE_NAME, CONFIG_NAME, CURVES_NAME, RECORD_NAME, WEIGHTS_NAME

# Only these: training arguments may hold a token, and other files in the folder may be private.
RELEASED_FILES = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, RECORD_NAME, CURVES_NAME, CLASS_BALANCE_NAME]
RELEASED_FILES += ["model-*.safetensors", "model.safetensors.index.json", "preprocessor_config.json"]

# What to do, by the status of the Hub's response.
ADVICE = {
    401: "there is no valid token: run `hf auth login`, or set HF_TOKEN to a token with write access",
    403: "the token may not write there: use one with write access to this organisation",
    404: "there is no such repository or branch: make the branch first, or push to the main one",
    409: "somebody else wrote to the repository at the same time: push again",
    429: "too many requests: wait some minutes and push again",
}


class HubError(RuntimeError):
    """The Hub refused a request or could not be reached; the message names the remedy."""


def check_repo_id(repo_id: str) -> None:
    """Raise a `ValueError` if a repository id is malformed."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} cannot be the id of a repository: {hub_advice(error)}.") from error


@functools.cache
def _api(token: str | None) -> HfApi:
    # The same one for all calls, as it keeps background uploads in order.
    return HfApi(token=token, library_name="hf_noisekd")


def check_hub_access(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Create `repo_id` on the Hub if it is missing, check that `token` can write to it, and return its full id.

    `private` is for a new repository. A bad id, no token or one that cannot write, or no connection is a `HubError`.
    """
    api = _api(token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # With a read-only token `create_repo` succeeds if the repository exists.
        api.auth_check(repo_id, write=True)
    except Exception as error:  # of the Hub's client, and of either of the HTTP libraries below it
        raise HubError(f"Cannot push to {repo_id!r}: {hub_advice(error)}") from error
    return repo_id


def upload(folder: str | Path, repo_id: str, *, token: str | None = None, **kwargs) -> Any:
    """Upload the `RELEASED_FILES` as `HfApi.upload_folder` does; a `HubError` has the command to push again."""
    try:
        return _api(token).upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=RELEASED_FILES, **kwargs)
    except Exception as error:  # as above
        branch = f" --revision {kwargs['revision']}" if kwargs.get("revision") else ""
        raise HubError(
            f"The push to {repo_id!r} failed: {hub_advice(error)}. The student is complete in {folder}. Push it again "
            f"with `noisekd push --model {shlex.quote(str(folder))} --repo-id {repo_id}{branch}`."
        ) from error


def hub_advice(error: BaseException) -> str:
    """Return the remedy for an error of the Hub with its text, in one line."""
    text = " ".join(str(error).split())
    # After the upload of a large file the response is in the cause.
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, HFValidationError):
        advice = "the id must have the form organisation/name, of letters, digits, '-', '_' and '.'"
    elif status in ADVICE:
        advice = ADVICE[status]
    elif status is not None and status >= 500:
        advice = "the Hub has an internal error: push again later"
    elif constants.HF_HUB_OFFLINE:
        advice = "HF_HUB_OFFLINE=1 forbids requests: unset it to push"
    elif status is None and type(error.__cause__ or error).__module__.startswith(("http", "builtins")):
        advice = "the connection failed: push again once the Hub can be reached"
    else:
        return text
    return f"{advice} ({text})"
