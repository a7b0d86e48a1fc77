"""A Hub of our own on loopback: what huggingface_hub's client calls, access rights, and faults on demand.

with hub_server.serving() as hub:
    hub.add("somebody/model", folder)
    hub.fail("GET", r"model\\.safetensors", drop=True)
    ...  # a process with HF_ENDPOINT=hub.url, see hub_client.py
    hub["somebody/new"].contents()
"""

import base64
import hashlib
import json
import math
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import MAIN, Refused, Repository


# Who a token belongs to, and whether it may write. They look like the Hub's own, so that leaks are found as those are.
WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
TOKENS = {WRITER: ("somebody", True), READER: ("somebody", False)}
DATA_SETS = "datasets/"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".h5")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose method and path match.

    status: the answer. drop: the connection is closed in the middle of the body, of the request if it has one, else
    of the answer. keep: bytes of the body that arrive; the answer pretends that these are all. corrupt: a byte of the
    answer or of the upload is another.
    """

    method: str
    path: str
    times: int = 1
    status: int | None = None
    drop: bool = False
    keep: int | None = None
    corrupt: bool = False
    headers: dict = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The running server. requests: (method, path) of each, in order; served: the files that went out whole."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.requests, self.served, self.faults = {}, [], [], []
        self.uploaded = []  # sizes of LFS objects, as they arrived
        self.part_size = None  # in bytes: larger LFS objects are asked for in parts, as the Hub does with large ones
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __getitem__(self, name):
        return self.repositories[name]

    def add(self, name, folder=None, **settings):
        """A repository with the files of a folder. Returns it."""
        repository = self.repositories[name] = Repository(name, **settings)
        if folder is not None:
            repository.add_folder(folder)
        return repository

    def fail(self, method, path, **what):
        """Have requests go wrong; see Fault. path: a regular expression that is searched for."""
        self.faults.append(Fault(method, path, **what))

    def next_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def handle_error(self, request, client_address):
        pass  # a client that went away; what the server does wrong the tests see as an answer 500


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments):
        pass

    def answer(self):
        self.address, self.query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        self.server.requests.append((self.command, self.address))
        self.fault = self.server.next_fault(self.command, self.address)
        try:
            body = self.read_body()
            if body is None:
                return
            if self.fault is not None and self.fault.status is not None:
                headers = {"X-Error-Message": "the server said so", **self.fault.headers}
                raise Refused(self.fault.status, message=headers.pop("X-Error-Message"), **headers)
            for method, pattern, function in ROUTES:
                match = re.fullmatch(pattern, self.address)
                if match and method == ("GET" if self.command == "HEAD" else self.command):
                    function(self, *match.groups(), body)
                    return
            raise Refused(404, message=f"no such address: {self.address}")
        except Refused as refused:
            self.send_json({"error": refused.message}, refused.status, refused.headers)
        except (ConnectionError, BrokenPipeError):
            self.close_connection = True

    def read_body(self):
        """The body of the request, or None where a fault has closed the connection."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        if length and self.fault is not None and self.fault.drop:
            self.rfile.read(length // 2)
            self.hang_up()
            return None
        body = self.rfile.read(length)
        return changed(body) if body and self.fault is not None and self.fault.corrupt else body

    def hang_up(self):
        self.close_connection = True
        self.connection.shutdown(2)

    # Answers

    def send_json(self, content, status=200, headers=None):
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content, status=200, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Rights

    def user(self):
        """(name, whether it may write) of whoever asks; (None, False) for nobody."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None, False
        if token not in TOKENS:
            raise Refused(401, message="Invalid credentials in Authorization header")
        return TOKENS[token]

    def readable(self, name):
        user, _ = self.user()
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        return repository

    def writable(self, name):
        user, may_write = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        if not may_write or user != name.split("/")[0]:
            raise Refused(403, message="You don't have the rights for this")
        return self.readable(name)

    # What the client asks for

    def who_am_i(self, body):
        user, _ = self.user()
        if user is None:
            raise Refused(401, message="Invalid credentials in Authorization header")
        self.send_json({"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, body):
        content = json.loads(body)["content"]
        errors = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repository(self, body):
        asked = json.loads(body)
        user, may_write = self.user()
        if user is None:
            raise Refused(401, message="Invalid username or password.")
        name = f"{asked.get('organization') or user}/{asked['name']}"
        if not may_write or name.split("/")[0] != user:
            raise Refused(403, message="You don't have the rights to create a model under this namespace")
        with self.server.lock:
            exists = name in self.server.repositories
            if not exists:
                self.server.add(name, private=asked.get("visibility") == "private")
        url = {"url": f"{self.server.url}/{name}"}
        if exists:
            return self.send_json({**url, "error": "You already created this model repo"}, 409)
        return self.send_json(url)

    def delete_repository(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.user()[0]}/{asked['name']}"
        self.writable(name)
        del self.server.repositories[name]
        self.send_json({})

    def create_branch(self, name, branch, body):
        self.writable(name).create_branch(branch, json.loads(body).get("startingPoint") or MAIN)
        self.send_json({})

    def preupload(self, name, revision, body):
        files = self.writable(name).files(MAIN if "create_pr" in self.query else revision)
        answer = []
        for entry in json.loads(body)["files"]:
            mode = "lfs" if entry["path"].endswith(LFS_SUFFIXES) else "regular"
            line = {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False}
            if entry["path"] in files:
                line["oid"] = files[entry["path"]].etag
            answer.append(line)
        self.send_json({"files": answer})

    def lfs_batch(self, name, body):
        repository, objects = self.writable(name), []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in repository.lfs_objects:
                place = f"{self.server.url}/lfs/{name}"
                upload, size = {"href": f"{place}/{entry['oid']}"}, self.server.part_size
                if size is not None and entry["size"] > size:
                    parts = range(1, math.ceil(entry["size"] / size) + 1)
                    upload["header"] = {str(part): f"{upload['href']}/{part}" for part in parts}
                    upload["header"]["chunk_size"] = str(size)
                entry = {**entry, "actions": {"upload": upload, "verify": {"href": f"{place}/verify"}}}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, name, oid, body):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, message="the content does not have this SHA-256")
        self.server[name].lfs_objects[oid] = body
        self.server.uploaded.append(len(body))
        self.send(b"")

    def lfs_upload_part(self, name, oid, part, body):
        self.server[name].lfs_parts[oid, int(part)] = body
        self.send(b"", headers={"ETag": hashlib.md5(body).hexdigest()})

    def lfs_complete(self, name, oid, body):
        """Put the parts together that the client says it sent."""
        parts, content = self.server[name].lfs_parts, b""
        for entry in json.loads(body)["parts"]:
            part = parts.get((oid, entry["partNumber"]), b"")
            if hashlib.md5(part).hexdigest() != entry["etag"]:
                raise Refused(400, message=f"part {entry['partNumber']} is not what was sent")
            content += part
        self.lfs_upload(name, oid, content)

    def lfs_verify(self, name, body):
        entry = json.loads(body)
        content = self.server[name].lfs_objects.get(entry["oid"])
        if content is None or len(content) != entry["size"]:
            raise Refused(404, message="no such object")
        self.send_json({})

    def commit(self, name, revision, body):
        repository = self.writable(name)
        header, *operations = [json.loads(line) for line in body.splitlines() if line.strip()]
        values = [(each["key"], each["value"]) for each in operations]
        for kind, value in values:
            if kind == "file":
                value["content"] = base64.b64decode(value["content"])
        settings = header["value"]
        sha, reference = repository.commit(
            revision, settings["summary"], values, settings.get("parentCommit"), "create_pr" in self.query
        )
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.server.url}/{name}/commit/{sha}"}
        if reference is not None:
            answer["pullRequestUrl"] = f"{self.server.url}/{name}/discussions/{reference.rpartition('/')[2]}"
        self.send_json(answer)

    def repository_info(self, name, revision, body):
        repository = self.readable(name)
        sha = repository.resolve(revision or MAIN)
        siblings = [{"rfilename": path} for path in repository.files(sha)]
        self.send_json(
            {"id": name.removeprefix(DATA_SETS), "sha": sha, "private": repository.private, "tags": []}
            | {"siblings": siblings, "gated": "manual" if repository.gated else False}
        )

    def tree(self, name, revision, path, body):
        repository = self.readable(name)
        start = f"{path}/" if path else ""
        found = {name: blob for name, blob in repository.files(revision).items() if name.startswith(start)}
        if path and not found:
            raise Refused(404, "EntryNotFound", X_Repo_Commit=repository.resolve(revision))
        self.send_json([blob.described(name) for name, blob in sorted(found.items())])

    def paths_info(self, name, revision, body):
        asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
        files = self.readable(name).files(revision)
        found = {path: blob for path, blob in files.items() if path in asked["paths"]}
        self.send_json([blob.described(path) for path, blob in found.items()])

    def references(self, name, body):
        found = self.readable(name).references
        branches = [
            {"name": key, "ref": f"refs/heads/{key}", "targetCommit": sha}
            for key, sha in found.items()
            if not key.startswith("refs/")
        ]
        self.send_json({"branches": branches, "tags": [], "converts": []})

    def resolve(self, name, rest, body):
        repository = self.readable(name)
        if repository.gated:
            raise Refused(403 if self.user()[0] else 401, "GatedRepo", "Access to this model is restricted")
        revision, _, path = rest.partition("/")
        if rest.startswith("refs/"):
            revision, path = "/".join(rest.split("/")[:3]), "/".join(rest.split("/")[3:])
        sha = repository.resolve(revision)
        blob = repository.files(sha).get(path)
        headers = {"X-Repo-Commit": sha}
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        headers |= {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", "X-Linked-Size": str(len(blob.content))}
        self.send_file(path, blob.content, headers)

    def send_file(self, path, content, headers):
        status, size = 200, len(content)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            start, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            status, content = 206, content[start : last + 1]
            headers["Content-Range"] = f"bytes {start}-{last}/{size}"
        fault = self.fault if self.command == "GET" else None
        if fault is not None and fault.drop:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.hang_up()
            return
        if fault is not None and fault.keep is not None:
            content = content[: fault.keep]
        if fault is not None and fault.corrupt:
            content = changed(content)
        self.send(content, status, headers)
        if self.command == "GET":
            self.server.served.append(path)


def of_data_set(answer):
    """The same answer about a data set, which is the repository `datasets/OWNER/NAME`."""
    return lambda handler, name, *rest: answer(handler, f"{DATA_SETS}{name}", *rest)


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.who_am_i),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("DELETE", "/api/repos/delete", Handler.delete_repository),
    ("POST", f"/api/models/{ID}/branch/(.+)", Handler.create_branch),
    ("POST", f"/api/models/{ID}/preupload/(.+)", Handler.preupload),
    ("POST", f"/api/models/{ID}/commit/(.+)", Handler.commit),
    ("GET", f"/api/models/{ID}/refs", Handler.references),
    ("GET", rf"/api/models/{ID}/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?", Handler.tree),
    ("GET", f"/api/models/{ID}(?:/revision/(.+))?", Handler.repository_info),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", f"/lfs/{ID}/([0-9a-f]+)", Handler.lfs_upload),
    ("PUT", rf"/lfs/{ID}/([0-9a-f]+)/(\d+)", Handler.lfs_upload_part),
    ("POST", f"/lfs/{ID}/verify", Handler.lfs_verify),
    ("POST", f"/lfs/{ID}/([0-9a-f]+)", Handler.lfs_complete),
    ("GET", f"/{ID}/resolve/(.+)", Handler.resolve),
    ("GET", rf"/api/datasets/{ID}/tree/(refs/pr/\d+|[^/]+)(?:/(.*))?", of_data_set(Handler.tree)),
    ("POST", f"/api/datasets/{ID}/paths-info/(.+)", of_data_set(Handler.paths_info)),
    ("GET", f"/api/datasets/{ID}(?:/revision/(.+))?", of_data_set(Handler.repository_info)),
    ("GET", f"/datasets/{ID}/resolve/(.+)", of_data_set(Handler.resolve)),
]


def changed(content):
    """The same number of bytes, the middle one another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@contextmanager
def serving():
    """A context that gives a running Hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
