"""The repositories of the tests' Hub, in memory: files, commits, branches and pull requests."""

import hashlib
import threading
from dataclasses import dataclass


MAIN = "main"


class Refused(Exception):
    """A request that is answered with an error. code: the X-Error-Code that huggingface_hub tells errors apart by."""

    def __init__(self, status, code=None, message=None, **headers):
        super().__init__(message or code)
        self.status, self.message = status, message or code or str(status)
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self):
        """git's id of the file; of an LFS file that of the pointer in its place."""
        content = self.content
        if self.is_lfs:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            ).encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.is_lfs else self.oid

    def described(self, path):
        """As the Hub lists it in a tree."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return entry


@dataclass(frozen=True)
class Commit:
    parent: str | None
    message: str
    files: dict[str, Blob]


class Repository:
    """One model's history. Every change is one commit, made whole or not at all.

    gated: its files are for nobody. lfs_objects: uploads that are complete, which a commit may refer to. lfs_parts:
    what has arrived of those that are sent in parts, by (oid, number of the part).
    """

    def __init__(self, name, private=False, gated=False):
        self.name, self.private, self.gated = name, private, gated
        self.commits, self.references, self.num_pull_requests = {}, {}, 0
        self.lfs_objects, self.lfs_parts = {}, {}
        self.lock = threading.Lock()
        self.references[MAIN] = self._add(Commit(None, "initial commit", {".gitattributes": Blob(b"")}))

    def _add(self, commit):
        listing = "".join(f"{path}:{blob.etag}\n" for path, blob in sorted(commit.files.items()))
        text = f"{self.name}\n{commit.parent}\n{commit.message}\n{listing}{len(self.commits)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = commit
        return sha

    def resolve(self, revision):
        """The commit that a branch, a pull request or a commit's own id names."""
        sha = self.references.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def files(self, revision=MAIN):
        """Map each path at a revision to its Blob."""
        return self.commits[self.resolve(revision)].files

    def contents(self, revision=MAIN):
        """Map each path at a revision to its bytes, without git's own file."""
        return {path: blob.content for path, blob in self.files(revision).items() if path != ".gitattributes"}

    def create_branch(self, name, start=MAIN):
        with self.lock:
            if name in self.references:
                raise Refused(409, message=f"Reference already exists: {name}")
            self.references[name] = self.resolve(start)

    def commit(self, revision, message, operations, parent=None, create_pr=False):
        """Apply operations [(kind, value)] to a branch. Returns (commit id, the pull request's reference or None)."""
        with self.lock:
            head = self.resolve(revision)
            if parent is not None and not head.startswith(parent) and not create_pr:
                raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            if revision not in self.references and not create_pr:
                raise Refused(400, message=f"{revision} is no branch")
            files = dict(self.commits[head].files)
            for kind, value in operations:
                self._apply(files, kind, value)
            sha = self._add(Commit(head, message, files))
            if not create_pr:
                self.references[revision] = sha
                return sha, None
            self.num_pull_requests += 1
            reference = f"refs/pr/{self.num_pull_requests}"
            self.references[reference] = sha
            return sha, reference

    def _apply(self, files, kind, value):
        path = value["path"]
        if kind == "file":
            files[path] = Blob(value["content"])
        elif kind == "lfsFile":
            if value["oid"] not in self.lfs_objects:
                raise Refused(400, message=f"{path} points to an LFS object that was not uploaded")
            files[path] = Blob(self.lfs_objects[value["oid"]], is_lfs=True)
        elif kind == "deletedFile":
            del files[path]
        elif kind == "deletedFolder":
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[name]
        else:
            raise Refused(400, message=f"unknown operation {kind}")

    def add_folder(self, folder, message="files", lfs_suffixes=(".safetensors",)):
        """Commit every file below a folder to the main branch. Returns the commit's id."""
        files = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix in lfs_suffixes)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        with self.lock:
            head = self.references[MAIN]
            merged = {**self.commits[head].files, **files}
            self.references[MAIN] = self._add(Commit(head, message, merged))
            return self.references[MAIN]
