"""A W&B server on this machine, as much of one as a run needs: it keeps what it is sent, and a resumed run is told.

What it answers is what W&B's own client asks for; it has been made by looking at those questions.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PROJECT = {"id": "p", "name": "evomem", "entity": {"id": "e", "name": "somebody"}}


class Server(ThreadingHTTPServer):
    """Attributes: history (lines of all sessions by their place), files (name -> bytes), asked (raw bodies)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.history, self.files, self.asked, self.config, self.exits = {}, {}, [], {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        """No longer answer; a second call does nothing."""
        self.shutdown()
        self.server_close()

    def lines(self):
        return [json.loads(self.history[place]) for place in sorted(self.history)]

    def graphql(self, query, variables):
        kind = re.search(r"(?:query|mutation)\s+(\w+)", query).group(1)
        if kind == "UpsertBucket":
            self.config.update(json.loads(variables.get("config") or "{}"))
            bucket = {"id": "b", "name": variables["name"], "historyLineCount": len(self.history), "project": PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.history}}
        if kind == "RunResumeStatus":
            tail = json.dumps([self.history[max(self.history)]] if self.history else [])
            bucket = {
                "id": "b", "name": variables["name"], "config": json.dumps(self.config), "summaryMetrics": "{}",
                "historyLineCount": len(self.history), "historyTail": tail, "wandbConfig": '{"t":{}}',
                "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0,
            }  # fmt: skip
            return {"model": {**PROJECT, "bucket": bucket if self.history else None}}
        if kind == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, data):
        part = data.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
        for place, line in enumerate(part["content"], start=part["offset"]):
            self.history[place] = line
        if data.get("complete"):
            self.exits.append(data["exitcode"])


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def _answer(self):
        body, answer = self.rfile.read(int(self.headers.get("content-length") or 0)), {}
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.asked.append(body)
        if self.path == "/graphql":
            question = json.loads(body)
            answer = {"data": self.server.graphql(question["query"], question.get("variables", {}))}
        elif self.path.endswith("/file_stream"):
            self.server.stream(json.loads(body))
        elif self.path.startswith("/upload/"):
            self.server.files[self.path.removeprefix("/upload/")] = body
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _answer
