"""The Hub: check write access and what is there first, upload the files of a model, and explain errors."""

import fnmatch
import functools
import glob
import json
import logging
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from hf_noisekd.files import CARD_NAME, CLASS_BALANCE_NAME, CONFIG_NAME, CURVES_NAME, RECORD_NAME, WEIGHTS_NAME

logger = logging.getLogger(__name__)

OWN = "noisekd"  # the tag of our cards, and the section of a student's config.json

# Only these: training arguments may hold a token, and other files in the folder may be private.
RELEASED_FILES = [CONFIG_NAME, WEIGHTS_NAME, CARD_NAME, RECORD_NAME, CURVES_NAME, CLASS_BALANCE_NAME]
RELEASED_FILES += ["model-*.safetensors", "model.safetensors.index.json", "preprocessor_config.json"]
# What loaders would take beside these, or in their place. Other files in a repository are its owner's affair.
OF_OTHERS = ["pytorch_model*", "tf_model*", "flax_model*", "model.ckpt*", "rust_model.ot", "saved_model.pb"]
OF_OTHERS += ["open_clip_*", "adapter_*", "processor_config.json"]
SHOWN = 5  # names of files in a message

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


def check_hub_access(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    hub_overwrite: bool = False,
) -> str:
    """Create `repo_id` on the Hub if it is missing, check that a student can be pushed there, and return its full id.

    `private` is for a new repository, `revision` is the branch. A bad id, no token or one that cannot write, or no
    connection is a `HubError`, and so are files of another model in the repository, unless `hub_overwrite`.
    """
    api = _api(token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # With a read-only token `create_repo` succeeds if the repository exists.
        api.auth_check(repo_id, write=True)
        _replaced_files(api, repo_id, revision, hub_overwrite)
    except HubError:
        raise
    except Exception as error:  # of the Hub's client, and of either of the HTTP libraries below it
        raise HubError(f"Cannot push to {repo_id!r}: {hub_advice(error)}") from error
    return repo_id


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    hub_overwrite: bool = False,
    **kwargs,
) -> Any:
    """Upload the `RELEASED_FILES` as `HfApi.upload_folder` does; a `HubError` has the command to push again.

    Files of an earlier student that this one does not have are removed in the same commit. Those of another model are,
    too, with `hub_overwrite`, and a `HubError` without.
    """
    api = _api(token)
    try:
        replaced = _replaced_files(api, repo_id, revision, hub_overwrite)
        own = [path.name for path in Path(folder).iterdir() if _is_any(path.name, RELEASED_FILES)]
        if stale := [name for name in replaced if name not in own]:
            logger.warning("Of what was in %s is removed: %s.", repo_id, _listed(stale))
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=RELEASED_FILES,
            delete_patterns=[glob.escape(name) for name in stale],
            revision=revision,
            **kwargs,
        )
    except Exception as error:  # as above
        reason = error if isinstance(error, HubError) else f"The push to {repo_id!r} failed: {hub_advice(error)}."
        options = f" --revision {revision}" if revision else ""
        options += " --overwrite" if hub_overwrite or isinstance(error, HubError) else ""
        raise HubError(
            f"{reason} The student is complete in {folder}. Push it again with `noisekd push --model "
            f"{shlex.quote(str(folder))} --repo-id {repo_id}{options}`."
        ) from error


def _replaced_files(api: HfApi, repo_id: str, revision: str | None, hub_overwrite: bool) -> list[str]:
    """Return the files of a model in a repository; a `HubError` if they are another's, unless `hub_overwrite`."""
    tree = api.list_repo_tree(repo_id, revision=revision)
    names = [entry.path for entry in tree if isinstance(entry, RepoFile)]
    found = [name for name in names if _is_any(name, RELEASED_FILES + OF_OTHERS)]
    if hub_overwrite or not found:
        return found
    texts = [name for name in (CARD_NAME, CONFIG_NAME) if name in found]
    is_own = texts and all(_is_own(Path(api.hf_hub_download(repo_id, name, revision=revision))) for name in texts)
    others = [name for name in found if not (is_own and _is_any(name, RELEASED_FILES))]
    if others:
        raise HubError(
            f"{repo_id} has {_listed(others)}, of no student of this package: push to another repository, or replace "
            "these files with hub_overwrite."
        )
    return found


def _is_own(path: Path) -> bool:
    """Whether a card or a configuration is of a student of this package."""
    try:
        if path.name == CONFIG_NAME:
            return OWN in json.loads(path.read_text(encoding="utf-8"))
        return OWN in (metadata_load(path) or {})["tags"]
    except Exception:  # it may hold anything
        return False


def _is_any(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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
