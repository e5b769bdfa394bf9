"""A server that answers as Hugging Face's does when a repository is downloaded."""

from __future__ import annotations

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

    Args:
        folder: content of the repository.
        repo: "owner/name".
    """
    asked: list[str] = []
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [str(path.relative_to(folder)) for path in files]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            asked.append(path)
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
            if self.command == "GET":
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
