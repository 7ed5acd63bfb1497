"""A model hub on this machine, as much of one as a plug-in needs: repositories, commits, revisions, files.

What it answers is what ``huggingface_hub`` asks for. Every file is taken with the commit itself; the real hub wants
safetensors through its store for large files, which is the client's business and is not played here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Server(ThreadingHTTPServer):
    """Attributes: commits (repository -> list of (sha, message, files by path)), asked (methods and paths).

    lies ((repository, file) -> size that it is said to have), private (repository -> asked for when made),
    tokens (may write; none: all).
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits, self.asked, self.lies, self.private, self.tokens = {}, [], {}, {}, set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def state(self, repository, revision="main"):
        """(sha, files) of a branch or commit, or None."""
        commits = self.commits.get(repository, [])
        if revision == "main" and commits:
            return commits[-1][0], commits[-1][2]
        return next(((sha, files) for sha, _, files in commits if sha == revision), None)

    def commit(self, repository, lines):
        """Take a commit; a line is a header, a file, or a deletion."""
        files = dict(self.commits[repository][-1][2])
        message = ""
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(repr((message, sorted(files.items()), len(self.commits[repository]))).encode()).hexdigest()
        self.commits[repository].append((sha, message, files))
        return sha


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        for name, value in {"content-length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code):
        self.answer({"error": code}, 404, X_Error_Code=code)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        server, parts = self.server, urlsplit(self.path).path.strip("/").split("/")
        server.asked.append(("POST", self.path))
        if server.tokens and self.headers.get("authorization", "").removeprefix("Bearer ") not in server.tokens:
            return self.answer({"error": "Invalid username or password."}, 401)
        if parts == ["api", "repos", "create"]:
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'somebody'}/{wanted['name']}"
            server.commits.setdefault(name, [("0" * 40, "initial", {})])
            server.private.setdefault(name, wanted.get("private") or wanted.get("visibility") == "private")
            return self.answer({"url": f"{server.url}/{name}", "name": name})
        if parts == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        name, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        sha = server.commit(name, body.splitlines())
        return self.answer({"success": True, "commitOid": sha, "commitUrl": f"{server.url}/{name}/commit/{sha}"})

    def do_GET(self):
        path, server = unquote(urlsplit(self.path).path).strip("/"), self.server
        parts = path.split("/")
        server.asked.append((self.command, path))
        if parts[:2] == ["api", "models"]:
            name, revision = "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main"
            if name not in server.commits:
                return self.missing("RepoNotFound")
            found = server.state(name, revision)
            if found is None:
                return self.missing("RevisionNotFound")
            sizes = {file: server.lies.get((name, file), len(content)) for file, content in found[1].items()}
            if parts[4:5] == ["tree"]:
                return self.answer([{"type": "file", "path": f, "size": s, "oid": "0"} for f, s in sizes.items()])
            siblings = [{"rfilename": file, "size": size} for file, size in sizes.items()]
            return self.answer({"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "tags": []})
        if parts[2:3] != ["resolve"]:
            return self.missing("NotPlayedHere")
        name, revision, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        found = server.state(name, revision)
        if found is None or file not in found[1]:
            return self.missing("EntryNotFound")
        content = found[1][file]
        tag = hashlib.sha1(content).hexdigest()
        return self.answer(content, X_Repo_Commit=found[0], ETag=f'"{tag}"', Accept_Ranges="none")

    do_HEAD = do_GET
