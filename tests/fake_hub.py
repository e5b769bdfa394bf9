"""A server that answers as Hugging Face's does when a repository is down- or uploaded."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def fake_hub(folder: Path, repo: str) -> Iterator[tuple[str, list[str]]]:
    """URL of a hub with one repository, and the paths that were requested.

    The repository is made, and its files are written, by the requests of an upload with the token
    "writer"; other tokens are refused.

    Args:
        folder: content of the repository; it exists if the folder does.
        repo: "owner/name".
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked.append(path)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            names = [str(path.relative_to(folder)) for path in files]
            if path.startswith(f"/api/models/{repo}/tree/"):
                self.answer(
                    json.dumps(
                        [
                            {
                                "type": "file",
                                "path": name,
                                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                                "size": file.stat().st_size,
                            }
                            for name, file in zip(names, files, strict=True)
                        ]
                    )
                )
            elif path.startswith(f"/api/models/{repo}"):
                listed = [{"rfilename": name} for name in names]
                self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": listed}))
            elif (name := path.removeprefix(f"/{repo}/resolve/").partition("/")[2]) in names:
                self.answer((folder / name).read_bytes())
            else:
                self.answer("{}", 404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = urlsplit(self.path).path
            asked.append(path)
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.headers["Authorization"] != "Bearer writer":
                self.answer('{"error": "no right to write"}', 403)
            elif path == "/api/repos/create":
                known = folder.is_dir()
                folder.mkdir(exist_ok=True)
                self.answer(
                    json.dumps({"url": f"http://{self.headers['Host']}/{repo}"}),
                    409 if known else 200,
                )
            elif path == "/api/validate-yaml":
                self.answer('{"errors": [], "warnings": []}')
            elif path == f"/api/models/{repo}/preupload/main":
                given = [file["path"] for file in json.loads(body)["files"]]
                mode = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self.answer(json.dumps({"files": [{"path": name, **mode} for name in given]}))
            elif path == f"/api/models/{repo}/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        target = folder / line["value"]["path"]
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(base64.b64decode(line["value"]["content"]))
                    elif line["key"] == "deletedFile":
                        (folder / line["value"]["path"]).unlink()
                url = f"http://{self.headers['Host']}/{repo}/commit/{COMMIT}"
                self.answer(json.dumps({"success": True, "commitOid": COMMIT, "commitUrl": url}))
            else:
                self.answer("{}", 404)

        def answer(
            self, content: str | bytes, code: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            body = content.encode() if isinstance(content, str) else content
            given = {
                "ETag": f'"{hashlib.sha1(body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                **(headers or {}),
            }
            self.send_response(code)
            for name, value in given.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
