"""The Hub of the other tests behaves as huggingface.co does, seen from the real client."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_server import HubServer
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session
from safetensors.numpy import save_file

CUT = "disconnected without sending a response"  # its class is that of the HTTP library below the client
CARD = "---\nlicense: mit\nlibrary_name: timm\ntags:\n- tiny\n---\n# Model\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "figures").mkdir(parents=True)
    (folder / "config.json").write_text('{"architecture": "resnet10t"}')
    (folder / "README.md").write_text(CARD)
    (folder / "figures" / "loss.png").write_bytes(b"\x89PNG" + bytes(range(256)))
    save_file({"weight": np.arange(1000, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tries(hub, path_pattern) -> int:
    return sum(bool(re.search(path_pattern, path)) for _, path in hub.requests)


def test_what_goes_up_comes_down_bit_for_bit(hub, folder):
    url = huggingface_hub.create_repo("alice/model")
    assert (url, url.repo_id) == (f"{hub.url}/alice/model", "alice/model")
    commit = huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder, commit_message="First")
    repo = hub.repo("alice/model")
    assert [one["title"] for one in repo.commits] == ["initial commit", "First"]
    assert commit.oid == repo.head["oid"]
    assert {path: data for path, data in repo.head["files"].items() if path != ".gitattributes"} == contents(folder)
    assert {path for path, blob in repo.head["files"].blobs.items() if blob.lfs} == {
        "figures/loss.png",
        "model.safetensors",
    }
    downloaded = huggingface_hub.hf_hub_download("alice/model", "figures/loss.png")
    assert Path(downloaded).read_bytes() == repo.read("figures/loss.png")
    assert contents(huggingface_hub.snapshot_download("alice/model")) == dict(repo.head["files"])
    assert sorted(huggingface_hub.list_repo_files("alice/model")) == sorted(repo.head["files"])

    huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(repo.commits) == 2, "the hashes the server gives tell the client that nothing changed"


def test_a_client_started_with_the_environment_stays_here(hub, tmp_path):
    hub.create_repo("alice/model", private=True, files={"config.json": b"{}", "model.bin": b"weights"})
    code = "import huggingface_hub; print(huggingface_hub.snapshot_download('alice/model'))"
    environment = os.environ | hub.client_env(tmp_path / "other", token="hf_read")
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    snapshot = contents(output.stdout.strip())
    assert (snapshot["config.json"], snapshot["model.bin"]) == (b"{}", b"weights")
    assert output.stdout.startswith(str(tmp_path / "other"))


def test_every_commit_stays_readable_by_its_oid(hub):
    first = hub.create_repo("alice/model", files={"a.txt": b"1", "b.txt": b"kept"}).head["oid"]
    second = huggingface_hub.upload_file(repo_id="alice/model", path_in_repo="a.txt", path_or_fileobj=b"2").oid
    third = huggingface_hub.delete_file("a.txt", "alice/model").oid

    def read(**kwargs):
        return Path(huggingface_hub.hf_hub_download("alice/model", "a.txt", **kwargs)).read_bytes()

    assert (read(revision=first), read(revision=second)) == (b"1", b"2")
    with pytest.raises(EntryNotFoundError):
        read()
    assert huggingface_hub.model_info("alice/model", revision=first).sha == first
    assert huggingface_hub.model_info("alice/model").sha == third
    with pytest.raises(HfHubHTTPError, match="412"):
        huggingface_hub.upload_file(
            repo_id="alice/model", path_in_repo="c.txt", path_or_fileobj=b"3", parent_commit=first
        )


def test_model_info_reads_the_card(hub):
    hub.create_repo("alice/model", private=True, files={"README.md": CARD.encode()})
    info = huggingface_hub.model_info("alice/model")
    assert info.card_data.to_dict() == {"license": "mit", "library_name": "timm", "tags": ["tiny"]}
    assert (info.private, info.library_name, info.tags) == (True, "timm", ["timm", "tiny", "license:mit"])
    assert {sibling.rfilename for sibling in info.siblings} == {".gitattributes", "README.md"}
    assert huggingface_hub.model_info(hub.create_repo("alice/bare").repo_id).card_data is None


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: [mit", "does not parse"),
        ("license: 3", "license"),
        ("license: mobileone-license", "license"),
        ("license: [mit, CC BY-NC 4.0]", "license"),
        ("license: other\nlicense_name: CC BY-NC", "license_name"),
        ("library_name: [timm]", "library_name"),
        ("tags: tiny", "tags"),
        ("model-index: {name: a}", "model-index"),
        ("model-index: [{name: a}]", "model-index"),
    ],
)
def test_bad_card_metadata_is_refused(hub, folder, metadata, complaint):
    hub.create_repo("alice/model")
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n")
    with pytest.raises(ValueError, match=complaint):
        huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(hub.repo("alice/model").commits) == 1


def test_tokens(hub):
    hub.tokens["hf_bob"] = ("bob", "write")
    hub.create_repo("alice/model")
    assert HfApi().whoami()["name"] == "alice"
    HfApi().auth_check("alice/model", write=True)
    for token in ("hf_read", "hf_bob"):
        HfApi(token=token).auth_check("alice/model")
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).auth_check("alice/model", write=True)
        with pytest.raises(HfHubHTTPError, match="403"):
            HfApi(token=token).upload_file(repo_id="alice/model", path_in_repo="a", path_or_fileobj=b"a")
    for token, status in [("hf_read", "403"), ("hf_bob", "403"), ("hf_wrong", "401"), (False, "401")]:
        with pytest.raises(HfHubHTTPError, match=status):
            HfApi(token=token).create_repo("alice/other")
    with pytest.raises(HfHubHTTPError, match="401") as failure:
        HfApi(token="hf_wrong").auth_check("alice/model")
    assert not isinstance(failure.value, RepositoryNotFoundError)


def test_create_repo_of_one_that_exists(hub):
    hub.create_repo("alice/model")
    with pytest.raises(HfHubHTTPError, match="409"):
        huggingface_hub.create_repo("alice/model")
    # A read token is refused, then the client looks whether the repository exists and contents itself with that.
    for token in ("hf_write", "hf_read"):
        assert huggingface_hub.create_repo("alice/model", exist_ok=True, token=token).repo_id == "alice/model"
    assert len(hub.repo("alice/model").commits) == 1


def test_private_repositories_are_hidden_from_others(hub, tmp_path):
    hub.tokens["hf_bob"] = ("bob", "write")
    huggingface_hub.create_repo("alice/secret", private=True)
    assert hub.repo("alice/secret").private
    huggingface_hub.hf_hub_download("alice/secret", ".gitattributes", token="hf_read")
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.model_info("alice/secret", token=token)
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.hf_hub_download("alice/secret", ".gitattributes", token=token, cache_dir=tmp_path)


@pytest.mark.parametrize("token", ["hf_write", "hf_read", False])
def test_what_is_missing_is_told_apart(hub, token):
    hub.create_repo("alice/model")
    api = HfApi(token=token)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("alice/none", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("none")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("alice/model", "a.txt", revision="v1/beta")
    with pytest.raises(RevisionNotFoundError):
        api.snapshot_download("alice/model", revision="v1/beta")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("alice/model", "a.txt")


@pytest.mark.parametrize("how", [401, 403, 409, 429, 500, "cut"])
def test_a_commit_that_fails_changes_nothing(hub, folder, waits, how):
    before = hub.create_repo("alice/model", files={"config.json": b"{}"}).head
    hub.fail(how, method="POST", path_pattern="/commit/")
    with pytest.raises(Exception, match=CUT if how == "cut" else str(how)) as failure:
        huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert isinstance(failure.value, HfHubHTTPError) == (how != "cut")
    assert hub.repo("alice/model").head is before
    assert (tries(hub, "/commit/"), waits) == (1, []), "without Xet a commit is tried once"
    huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert hub.repo("alice/model").read("config.json") == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("path_pattern", ["/preupload/", "/objects/batch", "/objects/[0-9a-f]{64}", "/verify"])
@pytest.mark.parametrize("how", [429, 500, "cut", "lost"])
def test_the_client_retries_what_comes_before_the_commit(hub, folder, waits, path_pattern, how):
    hub.create_repo("alice/model")
    (folder / "figures" / "loss.png").unlink()
    hub.fail(how, path_pattern=path_pattern, times=2)
    huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert (tries(hub, path_pattern), waits) == (3, [1, 2])
    assert len(hub.repo("alice/model").commits) == 2


def test_failures_last_as_long_as_asked(hub, waits):
    hub.create_repo("alice/model")
    hub.fail(503, method="HEAD", path_pattern=r"/resolve/main/\.git", times=None)
    huggingface_hub.model_info("alice/model")
    with pytest.raises(LocalEntryNotFoundError):
        huggingface_hub.hf_hub_download("alice/model", ".gitattributes")
    assert len(waits) == 5
    hub.clear_failures()
    huggingface_hub.hf_hub_download("alice/model", ".gitattributes")


def test_a_download_cut_short_is_resumed(hub, waits, monkeypatch):
    weights = bytes(range(256)) * 100
    hub.create_repo("alice/model", files={"model.bin": weights})
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.fail("lost", method="GET", path_pattern="model.bin")
    assert Path(huggingface_hub.hf_hub_download("alice/model", "model.bin")).read_bytes() == weights
    assert waits == [1]


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="the client has no Xet")
def test_a_client_with_xet_retries_its_commit(hub, folder, waits, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.lfs = False
    repo = hub.create_repo("alice/model")
    hub.fail(500, path_pattern="/commit/", times=2)
    huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert (tries(hub, "/commit/"), waits) == (3, [1, 2])
    assert {path: data for path, data in repo.head["files"].items() if path != ".gitattributes"} == contents(folder)

    (folder / "config.json").write_text("{}")
    hub.fail("lost", path_pattern="/commit/")
    huggingface_hub.upload_folder(repo_id="alice/model", folder_path=folder)
    assert len(repo.commits) == 4, "the commit whose answer was lost was made twice"


def test_an_lfs_upload_is_checked(hub):
    hub.create_repo("alice/model")
    url, oid, client = f"{hub.url}/alice/model.git/info/lfs/objects", "0" * 64, get_session()
    assert client.put(f"{url}/{oid}", content=b"data").status_code == 403, "nobody asked for it"
    headers, batch = {"Authorization": "Bearer hf_write"}, {"objects": [{"oid": oid, "size": 4}]}
    assert client.post(f"{url}/batch", json=batch, headers=headers).json()["objects"][0]["actions"]
    assert client.put(f"{url}/{oid}", content=b"data").status_code == 400, "its hash is another"


def test_the_port_can_be_chosen_and_is_given_back(hub, tmp_path, monkeypatch):
    first = HubServer(tmp_path / "first")
    first.server.server_close()
    with HubServer(tmp_path / "second", port=first.server.server_port) as second:
        second.create_repo("alice/model")
        second.patch_client(monkeypatch, tmp_path / "home")
        assert (second.url, huggingface_hub.repo_exists("alice/model")) == (first.url, True)
    with pytest.raises(Exception, match="refused"):
        huggingface_hub.repo_exists("alice/model")
