"""Push a student that was saved."""

from pathlib import Path
from typing import Any

from hf_noisekd.files import RECORD_NAME, WEIGHTS_NAME, check_model_folder
from hf_noisekd.release.card import write_model_card
from hf_noisekd.release.hub import check_hub_access, upload


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload student",
    hub_overwrite: bool = False,
) -> str:
    """Push a saved model to the Hub with its card, record and figures, and return the URL of the commit.

    The card is rendered again first, so that its code loads the student from `repo_id`, which is created if missing:
    `organisation/name`, or a name alone for the user's own. By default the organisation decides on `private`, the token
    is that of `hf auth login` or of `HF_TOKEN`, and `revision` is the main branch. What an earlier student left there
    is removed; another model only with `hub_overwrite`. Otherwise that is a `HubError`, as a refusal of the Hub is. A
    folder without a model is a `ValueError`.
    """
    folder = Path(folder).expanduser()
    has_record = (folder / RECORD_NAME).is_file()
    if not (has_record and (folder / WEIGHTS_NAME).is_file()):  # a plain torch module has no config.json
        check_model_folder(folder)
    target: Any = {"token": token, "revision": revision, "hub_overwrite": hub_overwrite}
    repo_id = check_hub_access(repo_id, private=private, **target)
    if has_record:
        write_model_card(folder, repo_id=repo_id)
    return upload(folder, repo_id, commit_message=commit_message, **target).commit_url
