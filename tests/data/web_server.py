"""A web server in a thread, which hands out the files of a folder and can be told to misbehave."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[[BaseHTTPRequestHandler, bytes, int], None]  # with the file, and how often it was asked for


class Server:
    """``answers`` by name of a file; ``asked`` counts requests. ``url`` has no slash at its end."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{port}"
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.asked[name] += 1
        path = self.folder / name
        if not path.is_file():
            request.send_error(404)
            return
        self.answers.get(name, whole)(request, path.read_bytes(), self.asked[name])


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            try:
                server.answer(self)
            except OSError:  # the client has heard enough
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads, httpd.block_on_close = True, False
    httpd.is_over = threading.Event()  # type: ignore[attr-defined]
    server = Server(folder, httpd.server_address[1])
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        httpd.is_over.set()  # type: ignore[attr-defined]
        httpd.shutdown()
        httpd.server_close()


def begin(request: BaseHTTPRequestHandler, **headers: object) -> None:
    request.send_response(200)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), str(value))
    request.end_headers()


def whole(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
    begin(request, Content_Length=len(data))
    request.wfile.write(data)


def broken(first_times: int, says_length: bool = True) -> Answer:
    """Breaks off in the middle, the first times."""

    def answer(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
        if times > first_times:
            whole(request, data, times)
            return
        begin(request, **({"Content_Length": len(data)} if says_length else {"Connection": "close"}))
        request.wfile.write(data[: len(data) // 2])
        request.close_connection = True

    return answer


def refused(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
    request.send_error(503)


def damaged(first_times: int) -> Answer:
    """One bit is wrong, the first times."""

    def answer(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
        flipped = data[:700] + bytes([data[700] ^ 1]) + data[701:]
        whole(request, flipped if times <= first_times else data, times)

    return answer


def endless(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
    """The file, and zeros for ever."""
    begin(request, Connection="close")
    request.close_connection = True
    request.wfile.write(data)
    while True:
        request.wfile.write(bytes(2**20))


def instead(other: bytes, **headers: object) -> Answer:
    """Other bytes, with headers of their own."""

    def answer(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
        begin(request, Content_Length=len(other), **headers)
        request.wfile.write(other)

    return answer


def silent(request: BaseHTTPRequestHandler, data: bytes, times: int) -> None:
    """Begins, and says no more until the server ends."""
    begin(request, Content_Length=len(data))
    request.wfile.write(data[:100])
    request.server.is_over.wait()  # type: ignore[attr-defined]
    request.close_connection = True
