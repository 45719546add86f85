"""A server of Weights & Biases, as far as a run needs one, and one that refuses, and one that never answers.
A program of its own: killing it is the loss of the network.

    python wandb_server.py takes|refuses|hangs FILE

The port is the first line of its output; the rows that it takes are appended to FILE.
"""

import json
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PROJECT = {"id": "p", "name": "project", "entity": {"id": "e", "name": "somebody"}}
BUCKET = {
    "id": "b",
    "name": "run",
    "displayName": "run",
    "description": "",
    "config": "{}",
    "sweepName": None,
}
REFUSAL = {"errors": [{"message": "user is not logged in"}], "data": None}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    refuses, rows = False, Path()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = REFUSAL if self.refuses else self._answer(body)
        data = json.dumps(answer).encode()
        self.send_response(401 if self.refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
            with self.rows.open("a") as file:
                file.writelines(f"{line}\n" for line in history.get("content", []))
            return {}
        if self.path != "/graphql":
            return {}
        query = json.loads(body)["query"]
        if "upsertBucket" in query:
            bucket = BUCKET | {"project": PROJECT, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}}
        return {"data": {}}

    def log_message(self, *arguments: Any) -> None: ...


def main(mode: str, rows: str) -> None:
    if mode == "hangs":
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:  # accepted, never read
            print(listening.getsockname()[1], flush=True)
            time.sleep(3600)
    Handler.refuses, Handler.rows = mode == "refuses", Path(rows)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
