"""A hub of data sets on this machine: the requests that datasets and huggingface_hub make, over real HTTP.

It can cut connections in the middle of a file.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Serves ``folder`` as the data set ``name``. After ``spared`` transfers of data, ``cuts`` are cut half way."""

    def __init__(self, folder, name, spared=0, cuts=0):
        self.folder = Path(folder)
        self.name = name
        self.spared = spared
        self.cuts = cuts
        self.cut = 0
        self.requests = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self):
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def entry(self, path):
        data = path.read_bytes()
        name = path.relative_to(self.folder).as_posix()
        return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.hub.requests.append(f"{self.command} {path}")
        api, resolve = f"/api/datasets/{self.hub.name}", f"/datasets/{self.hub.name}/resolve/"
        if path.startswith(resolve):
            self.send_file(path.removeprefix(resolve).split("/", 1)[1])
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": self.hub.entry(file)["path"]} for file in self.hub.files()]
            about = {"_id": "1", "id": self.hub.name, "sha": COMMIT, "private": False, "gated": False, "downloads": 0}
            self.send_json({**about, "likes": 0, "tags": [], "siblings": siblings, "disabled": False})
        elif path.startswith(f"{api}/paths-info/"):
            asked = parse_qs(body.decode()).get("paths", []) if b"{" not in body[:1] else json.loads(body)["paths"]
            self.send_json([self.hub.entry(f) for f in self.hub.files() if self.hub.entry(f)["path"] in asked])
        elif path.startswith(f"{api}/tree/"):
            self.send_json(self.tree(path.removeprefix(f"{api}/tree/"), parse_qs(url.query)))
        else:
            self.send_json({"error": "Entry not found"}, 404)

    def tree(self, where, query):
        under = where.split("/", 1)[1] + "/" if "/" in where else ""
        entries = [self.hub.entry(file) for file in self.hub.files()]
        entries = [entry for entry in entries if entry["path"].startswith(under)]
        folders = {parent.as_posix() for entry in entries for parent in Path(entry["path"]).parents} - {"."}
        folders = {folder for folder in folders if folder.startswith(under)}
        found = entries + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders]
        if query.get("recursive", ["false"])[0].lower() != "true":
            found = [entry for entry in found if "/" not in entry["path"].removeprefix(under)]
        return found

    def send_json(self, value, status=200):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, name):
        path = self.hub.folder / name
        if not path.is_file():
            self.send_json({"error": "Entry not found"}, 404)
            return
        data = path.read_bytes()
        size, wanted = len(data), self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or size - 1) + 1, size)
            data = data[start:stop]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(path.read_bytes()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if self.command == "HEAD":
            return
        if path.suffix != ".md" and self.hub.spared:
            self.hub.spared -= 1
        elif path.suffix != ".md" and self.hub.cuts:
            self.hub.cuts -= 1
            self.hub.cut += 1
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(data)
