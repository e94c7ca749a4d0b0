"""A Hugging Face Hub for tests: the real client speaks HTTP to it, and nothing leaves the machine.

    hub = HubServer(tmp_path)
    with hub:
        hub.patch_client(monkeypatch, tmp_path / "home")  # or, for a subprocess, env=os.environ | hub.client_env(home)
        huggingface_hub.create_repo("alice/model")
        hub.repo("alice/model").commits

Large files travel by plain LFS. The server cannot choose that: a client with hf_xet uploads them to Xet whatever it is
told, so both ways of pointing a client here disable Xet. To test such a client as it is, set `hub.lfs = False`: no file
is large then, and Xet has nothing to do.
"""

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

import yaml

from hf_noisekd.release.licenses import HUB_LICENSES

TOKENS = {"hf_write": ("alice", "write"), "hf_read": ("alice", "read")}
LFS_SUFFIXES = (".safetensors", ".png", ".bin")
LFS_SIZE = 1_000_000
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
BAD_TOKEN = "Invalid credentials in Authorization header"

# The client splits a repository id from what follows by position, and quotes every "/" in a revision.
REPO, REV = r"(?P<repo_id>[^/]+(?:/[^/]+)?)", r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, re.Pattern, Callable]] = []


def route(method: str, path: str) -> Callable:
    """Serve requests with this method and path, a regular expression, by the decorated method of the handler."""

    def register(function: Callable) -> Callable:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


class Answer(NamedTuple):
    """What a request gets: bytes as they are, anything else as JSON."""

    body: Any
    status: int = 200
    headers: Mapping[str, str] = {}


class HubError(Exception):
    """A refusal. The client chooses its exception class by the status and the Hub's `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] = {}):
        super().__init__(message)
        codes = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer({"error": message}, status, codes | dict(headers))


class Blob(NamedTuple):
    """A file's content, on disk under the hash that is also its ETag: sha256 in LFS, git's own hash elsewhere."""

    file: Path
    lfs: bool

    @property
    def etag(self) -> str:
        return self.file.name

    @property
    def size(self) -> int:
        return self.file.stat().st_size

    def describe(self) -> dict:
        """Size and hashes, as a listing of files gives them."""
        if not self.lfs:
            return {"size": self.size, "oid": self.etag}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {self.size}\n".encode()
        lfs = {"oid": self.etag, "size": self.size, "pointerSize": len(pointer)}
        return {"size": self.size, "oid": git_hash(pointer), "lfs": lfs}


class Files(Mapping):
    """The files of a commit, from path to bytes."""

    def __init__(self, blobs: dict[str, Blob]):
        self.blobs = blobs

    def __getitem__(self, path: str) -> bytes:
        return self.blobs[path].file.read_bytes()

    def __iter__(self):
        return iter(self.blobs)

    def __len__(self) -> int:
        return len(self.blobs)


class Repo:
    """A model repository.

    Attributes:
        private: Whether only a token of its namespace may read it.
        commits: Oldest first, each a dict of `oid`, `title` and `files`, the latter from path to bytes.
    """

    def __init__(self, repo_id: str, folder: Path, private: bool):
        self.repo_id, self.folder, self.private = repo_id, folder, private
        self.announced: set[str] = set()  # LFS objects that may be uploaded: an upload carries no token
        self.commits: list[dict] = []

    @property
    def head(self) -> dict:
        return self.commits[-1]

    def read(self, path: str) -> bytes:
        """Return a file at head."""
        return self.head["files"][path]

    def at(self, rev: str) -> dict:
        """Return the commit a revision names: the branch `main`, or an oid."""
        for commit in reversed(self.commits):
            if rev in ("main", commit["oid"]):
                return commit
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")

    def commit(self, title: str, blobs: dict[str, Blob]) -> str:
        """Append a commit with these files and return its oid."""
        content = [self.repo_id, title, len(self.commits), sorted((path, blob.etag) for path, blob in blobs.items())]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits.append({"oid": oid, "title": title, "files": Files(blobs)})
        return oid

    def store(self, data: bytes, lfs: bool) -> Blob:
        """Write a content to disk."""
        blob = self.lfs_object(hashlib.sha256(data).hexdigest()) if lfs else Blob(self.folder / git_hash(data), False)
        blob.file.parent.mkdir(parents=True, exist_ok=True)
        blob.file.write_bytes(data)
        return blob

    def lfs_object(self, oid: str) -> Blob:
        """Return the LFS object with a sha256, whose file is missing before its upload."""
        return Blob(self.folder / "lfs" / oid, True)


class HubServer:
    """A Hugging Face Hub on this machine: keeps repositories as files under a folder, speaks the client's protocol.

    Args:
        root: Where to keep the repositories.
        port: Port on 127.0.0.1, bound at once; 0 takes a free one.

    Attributes:
        url: What `HF_ENDPOINT` must be.
        tokens: From token to `(user name, "write" or "read")`. A user writes to their own namespace only.
        requests: `(method, path)` of every request seen, without the query.
        lfs: Whether large files go to LFS; else every file is a regular one.
    """

    def __init__(self, root: Path, port: int = 0):
        self.root, self.lock = Path(root), threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.failures: list[dict] = []
        self.requests: list[tuple[str, str]] = []
        self.reset()
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def start(self) -> "HubServer":
        """Serve from a daemon thread."""
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        """Stop serving and give the port back."""
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget repositories, failures and requests, and restore `tokens` and `lfs`."""
        with self.lock:
            for repo in self.repos.values():
                shutil.rmtree(repo.folder, ignore_errors=True)
            self.repos.clear()
            self.failures.clear()
            self.requests.clear()
            self.tokens, self.lfs = dict(TOKENS), True

    def fail(self, how: int | str, *, method: str | None = None, path_pattern: str = "", times: int | None = 1) -> None:
        """Make matching requests fail.

        Args:
            how: A status; `"cut"` to do nothing and close the connection without an answer; or `"lost"` to do what was
                asked and close the connection in the middle of the answer (which a HEAD does not notice).
            method: HTTP method, any if not given.
            path_pattern: Regular expression searched for in the path.
            times: How many requests fail; None means all until `clear_failures`.
        """
        with self.lock:
            self.failures.append({"how": how, "method": method, "path_pattern": path_pattern, "times": times})

    def clear_failures(self) -> None:
        """Let every request succeed again."""
        with self.lock:
            self.failures.clear()

    def next_failure(self, method: str, path: str) -> int | str | None:
        """Use up and return how a request has to fail, or None."""
        for failure in self.failures:
            if failure["method"] in (None, method) and re.search(failure["path_pattern"], path):
                if failure["times"] is not None:
                    failure["times"] -= 1
                    if not failure["times"]:
                        self.failures.remove(failure)
                return failure["how"]
        return None

    def create_repo(self, repo_id: str, private: bool = False, files: Mapping[str, bytes] = {}) -> Repo:
        """Make a repository without HTTP. Its first commit has `files` and the `.gitattributes` the Hub always adds."""
        with self.lock:
            repo = self.repos[repo_id] = Repo(repo_id, self.root / repo_id, private)
            contents = {".gitattributes": GITATTRIBUTES} | dict(files)
            blobs = {path: repo.store(data, self.is_large(path, len(data))) for path, data in contents.items()}
            repo.commit("initial commit", blobs)
            return repo

    def repo(self, repo_id: str) -> Repo:
        """Return a repository."""
        return self.repos[repo_id]

    def is_large(self, path: str, size: int) -> bool:
        """Whether a file goes to LFS."""
        return self.lfs and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)

    def client_env(self, home: Path, token: str | None = "hf_write") -> dict[str, str]:
        """Return the environment variables that keep a client to this server, to set before it is imported."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1",
        }

    def patch_client(self, monkeypatch, home: Path, token: str | None = "hf_write") -> None:
        """Do the same to the client of this process, which has read its variables, for the rest of a test."""
        from huggingface_hub import close_session, constants, hf_api

        for name, value in self.client_env(home, token).items():
            monkeypatch.setenv(name, value)
            if hasattr(constants, name):
                monkeypatch.setattr(constants, name, value == "1" if value in ("0", "1") else value)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", self.url)
        close_session()  # the shared HTTP client read the proxies when it was made


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    """Answers one request and closes the connection, as HTTP/1.0 does: a server that stopped then really is silent."""

    server: _Server

    def handle_request(self) -> None:
        hub, (path, _, query) = self.server.hub, self.path.partition("?")
        # A body left unread would reset the connection and lose the answer.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        with hub.lock:
            hub.requests.append((self.command, path))
            failure = hub.next_failure(self.command, path)
            if failure == "cut":
                return
            try:
                if isinstance(failure, int):
                    raise HubError(failure, BAD_TOKEN if failure == 401 else HTTPStatus(failure).phrase)
                answer = self.dispatch(path)
            except HubError as error:
                answer = error.answer
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body, default=str).encode()
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(body))} | dict(answer.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if failure == "lost" else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def log_message(self, *args) -> None:
        """Keep quiet: `HubServer.requests` has the log."""

    def dispatch(self, path: str) -> Answer:
        """Call the endpoint for a path."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.hub.tokens:
            raise HubError(401, BAD_TOKEN)
        self.user, self.role = self.server.hub.tokens.get(token, (None, None))
        for method, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if match and method == self.command.replace("HEAD", "GET"):
                groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
                answer = function(self, **groups)
                return answer if isinstance(answer, Answer) else Answer(answer)
        raise HubError(404, f"HubServer has no {self.command} {path}")

    def json(self) -> dict:
        return json.loads(self.body)

    def may_write(self, namespace: str) -> bool:
        return (self.user, self.role) == (namespace, "write")

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """Return a repository if the token allows it."""
        repo, namespace = self.server.hub.repos.get(repo_id), repo_id.split("/")[0]
        if repo is None or (repo.private and self.user != namespace) or (write and self.user is None):
            # To the anonymous the Hub answers 401, which the client takes for "not found" over https; over http it
            # needs the code to.
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not self.may_write(namespace):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> dict:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        access = {"displayName": "tests", "role": self.role}
        return {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token", "accessToken": access}}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self) -> Answer:
        card, errors = read_card(self.json()["content"])
        warnings = [] if card or errors else ["empty or missing yaml metadata in repo card"]
        messages = {"errors": errors, "warnings": warnings}
        body = {kind: [{"message": text} for text in texts] for kind, texts in messages.items()}
        return Answer(body, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def create(self) -> Answer:
        payload = self.json()
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = payload.get("organization") or self.user
        if not self.may_write(namespace):
            message = f'You don\'t have the rights to create a model under the namespace "{namespace}"'
            raise HubError(403, message)
        if payload.get("type", "model") != "model":
            raise HubError(400, "HubServer has model repositories only")
        repo_id = f"{namespace}/{payload['name']}"
        body = {"name": repo_id, "url": f"{self.server.hub.url}/{repo_id}"}
        if repo_id in self.server.hub.repos:
            return Answer(body | {"error": "You already created this model repo"}, 409)
        self.server.hub.create_repo(repo_id, payload.get("private", payload.get("visibility") == "private"))
        return Answer(body)

    @route("GET", f"/api/models/{REPO}/auth-check(?P<write>/write)?")
    def auth_check(self, repo_id: str, write: str = "") -> dict:
        self.repo(repo_id, write=bool(write))
        return {}

    @route("GET", f"/api/models/{REPO}/tree/{REV}(?:/(?P<path>.+))?")
    def tree(self, repo_id: str, rev: str, path: str = "") -> list[dict]:
        """List files; folders are left out, the client asks for none."""
        folder = f"{path}/" if path else ""
        blobs = {
            name: blob for name, blob in self.repo(repo_id).at(rev)["files"].blobs.items() if name.startswith(folder)
        }
        if path and not blobs:
            raise HubError(404, f"{path} does not exist on {rev}", "EntryNotFound")
        deep = self.query.get("recursive") == "true"
        return [
            {"type": "file", "path": name} | blob.describe()
            for name, blob in blobs.items()
            if deep or "/" not in name.removeprefix(folder)
        ]

    @route("GET", f"/api/models/{REPO}(?:/revision/{REV})?")
    def model_info(self, repo_id: str, rev: str = "main") -> dict:
        repo = self.repo(repo_id)
        commit = repo.at(rev)
        card, _ = read_card(commit["files"].get("README.md", b"").decode())
        tags = [card.get("library_name"), *(card.get("tags") or [])]
        tags += [f"license:{card['license']}"] if "license" in card else []
        siblings = [{"rfilename": path} for path in commit["files"]]
        info = {name: card[name] for name in ("library_name", "pipeline_tag", "model-index") if name in card}
        info |= {"id": repo_id, "modelId": repo_id, "author": repo_id.split("/")[0], "sha": commit["oid"]}
        info |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        return info | {"siblings": siblings, "cardData": card or None, "tags": list(filter(None, tags))}

    @route("POST", f"/api/models/{REPO}/preupload/{REV}")
    def preupload(self, repo_id: str, rev: str) -> dict:
        commit, files = self.repo(repo_id, write=True).at(rev), []
        for file in self.json()["files"]:
            mode = "lfs" if self.server.hub.is_large(file["path"], file["size"]) else "regular"
            known = commit["files"].blobs.get(file["path"])
            oid = known and known.etag  # the client leaves a file out of the commit if this is its hash
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files, "commitOid": commit["oid"]}

    @route("POST", rf"/{REPO}\.git/info/lfs/objects/batch")
    def lfs_batch(self, repo_id: str) -> dict:
        repo, objects = self.repo(repo_id, write=True), []
        for item in self.json()["objects"]:
            url = f"{self.server.hub.url}/{repo_id}.git/info/lfs"
            actions = {"upload": {"href": f"{url}/objects/{item['oid']}"}, "verify": {"href": f"{url}/verify"}}
            missing = not repo.lfs_object(item["oid"]).file.exists()
            objects.append({"oid": item["oid"], "size": item["size"]} | ({"actions": actions} if missing else {}))
            repo.announced.add(item["oid"])
        return {"transfer": "basic", "objects": objects}

    @route("PUT", rf"/{REPO}\.git/info/lfs/objects/(?P<oid>[0-9a-f]+)")
    def lfs_upload(self, repo_id: str, oid: str) -> dict:
        repo = self.server.hub.repos.get(repo_id)
        if repo is None or oid not in repo.announced:
            raise HubError(403, "Nobody asked to upload this object")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have the announced sha256")
        repo.store(self.body, lfs=True)
        return {}

    @route("POST", rf"/{REPO}\.git/info/lfs/verify")
    def lfs_verify(self, repo_id: str) -> dict:
        item = self.json()
        blob = self.repo(repo_id, write=True).lfs_object(item["oid"])
        if not blob.file.exists() or blob.size != item["size"]:
            raise HubError(404, "The object was not uploaded")
        return {}

    @route("POST", f"/api/models/{REPO}/commit/{REV}")
    def commit(self, repo_id: str, rev: str) -> dict:
        repo = self.repo(repo_id, write=True)
        if "create_pr" in self.query:
            raise HubError(400, "HubServer has no pull requests")
        if rev != "main":
            raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if header["value"].get("parentCommit", repo.head["oid"]) != repo.head["oid"]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(repo.head["files"].blobs)
        for key, value in map(dict.values, operations):
            path = value["path"]
            if key == "file":
                blobs[path] = repo.store(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                blobs[path] = repo.lfs_object(value["oid"])
                if not blobs[path].file.exists():
                    raise HubError(400, f"LFS pointer of {path} pointed to a file that does not exist")
            elif key == "deletedFile" and path in blobs:
                del blobs[path]
            else:
                raise HubError(400, f"HubServer cannot commit {key} {path}")
        if "README.md" in blobs:
            _, errors = read_card(blobs["README.md"].file.read_bytes().decode())
            if errors:
                raise HubError(400, f"Invalid metadata in README.md: {errors[0]}")
        oid = repo.commit(header["value"]["summary"], blobs)
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.server.hub.url}/{repo_id}/commit/{oid}"}

    @route("GET", f"/{REPO}/resolve/{REV}/(?P<path>.+)")
    def resolve(self, repo_id: str, rev: str, path: str) -> Answer:
        commit = self.repo(repo_id).at(rev)
        blob = commit["files"].blobs.get(path)
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit["oid"]})
        data, status = blob.file.read_bytes(), 200
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit["oid"], "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(span[1]), min(int(span[2] or blob.size), blob.size - 1) + 1
            if start >= blob.size:
                raise HubError(416, "Range not satisfiable")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{blob.size}"
            data, status = data[start:stop], 206
        return Answer(data, status, headers)


def git_hash(data: bytes) -> str:
    """Return git's hash of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def read_card(content: str) -> tuple[dict, list[str]]:
    """Return the metadata at the head of a model card and what is wrong with it."""
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", content, re.DOTALL)
    try:
        card = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata does not parse: {error}"]
    if not isinstance(card or {}, dict):
        return {}, ["YAML metadata must be a mapping"]
    right = {
        "license": lambda value: set(map(str, value if isinstance(value, list) else [value])) <= HUB_LICENSES,
        "license_name": lambda value: isinstance(value, str) and re.fullmatch(r"[a-z0-9.-]+", value),
        "library_name": lambda value: isinstance(value, str),
        "tags": lambda value: is_list_of(str, value),
        "model-index": lambda value: is_list_of(dict, value) and all("name" in m and "results" in m for m in value),
    }
    card = card or {}
    return card, [f'"{name}" is not valid' for name in card if name in right and not right[name](card[name])]


def is_list_of(kind: type, value: object) -> bool:
    """Whether a value is a list with items of this type only."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
