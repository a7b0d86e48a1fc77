"""A read-only stand-in for the Hub on loopback, enough for huggingface_hub's snapshot_download."""

import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


COMMIT = hashlib.sha1(b"the only commit").hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves `models`, each id to its folder, and "somebody/gated" to nobody. `served` lists files as they go out."""

    def __init__(self, models):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models = models
        self.served = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def log_message(self, *arguments):
        pass

    def answer(self, with_body):
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        model = match[1] if match else None
        if model == "somebody/gated":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if model not in self.server.models:
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        revision = match[2] if file else match[3] or "main"
        if revision not in ("main", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = self.server.models[model]
        if file:
            return self.send_file(folder, match[3], with_body)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        if api[2] == "tree":
            content = [
                {"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": etag(folder / name)}
                for name in names
            ]
        else:
            content = {"id": model, "sha": COMMIT, "private": False, "tags": []}
            content["siblings"] = [{"rfilename": name} for name in names]
        return self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send_file(self, folder, name, with_body):
        if not (folder / name).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(folder / name)}"'}
        if with_body:
            self.server.served.append(name)
        return self.send(200, content, headers, with_body)

    def send(self, code, content, headers, with_body=True):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serving(models):
    """A context that gives a running Hub."""
    hub = Hub(models)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
