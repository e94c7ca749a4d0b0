"""Push a student that was saved."""

from pathlib import Path

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
) -> str:
    """Push a saved model to the Hub with its card, record and figures, and return the URL of the commit.

    The card is rendered again first, so that its code loads the student from `repo_id`, which is created if missing:
    `organisation/name`, or a name alone for the user's own. By default the organisation decides on `private`, the token
    is that of `hf auth login` or of `HF_TOKEN`, and `revision` is the main branch. A folder without a model is a
    `ValueError`, and a refusal of the Hub a `HubError`.
    """
    folder = Path(folder).expanduser()
    has_record = (folder / RECORD_NAME).is_file()
    if not (has_record and (folder / WEIGHTS_NAME).is_file()):  # a plain torch module has no config.json
        check_model_folder(folder)
    repo_id = check_hub_access(repo_id, token=token, private=private)
    if has_record:
        write_model_card(folder, repo_id=repo_id)
    return upload(folder, repo_id, token=token, revision=revision, commit_message=commit_message).commit_url
