"""A source that has given pictures and, when it is opened again, is something else: a real run, a
small HTTP server, and a name that is looked up anew each time.
"""

import contextlib
import http.server
import io
import socket
import threading
import time

import folder_paths
import inprocess
import pytest
from counting import counted
from inprocess import Client, graph, until
from livediffusion.live import wires
from PIL import Image

pytestmark = pytest.mark.comfy
FORBIDDEN = "169.254.169.254"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Motion JPEG while that is what the server gives, else what it has turned to."""

    def do_GET(self):
        self.server.asked += 1
        if (turned := self.server.turned) is not None:
            status, headers, body = turned
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            while self.server.giving.is_set():
                self.server.sent += 1
                out = io.BytesIO()
                Image.fromarray(counted(self.server.sent)).save(out, "JPEG", quality=95)
                length = f"Content-Length: {out.tell()}\r\n\r\n"
                head = f"--frame\r\nContent-Type: image/jpeg\r\n{length}"
                self.wfile.write(head.encode() + out.getvalue() + b"\r\n")
                time.sleep(0.02)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    made.daemon_threads, made.block_on_close = True, False
    made.turned, made.giving, made.asked, made.sent = None, threading.Event(), 0, 0
    made.giving.set()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.giving.clear()
    made.shutdown()
    made.server_close()


class Names:
    """A name server whose answer turns, and a look at whom is connected to."""

    def __init__(self, monkeypatch):
        self.turned, self.looked, self.met = False, 0, []
        self._real, self._connect = socket.getaddrinfo, socket.create_connection
        monkeypatch.setattr(socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(socket, "create_connection", self.connect)

    def look_up(self, host, *rest, **more):
        if host != "localhost" or threading.current_thread().name != "livediffusion-name":
            return self._real(host, *rest, **more)
        self.looked += 1
        ip = FORBIDDEN if self.turned else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0))]

    def connect(self, place, *rest, **more):
        self.met.append(place)
        return self._connect(place, *rest, **more)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    return Names(monkeypatch)


def test_whatever_it_turns_to_the_run_goes_on_and_so_do_its_pictures(server, names):
    port = server.server_address[1]
    wires.allowed().add("address", f"http://localhost:{port}/film")
    elsewhere = socket.create_server(("127.0.0.1", 0))
    elsewhere.settimeout(0.1)
    other = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/film?key=hidden"
    html = {"Content-Type": "text/html"}
    turns = {
        "html": ((200, html, b"<p>Maintenance"), "gives text/html, which is no stream"),
        "empty": ((200, {}, b""), "which is no stream"),
        "redirect": ((302, {"Location": other}, b""), "is not allowed yet"),
        "forbidden": ((302, {"Location": f"http://{FORBIDDEN}/"}, b""), "It is not opened."),
        "name": (None, "It is not opened."),
    }

    async def turn(client, name, answer, words):
        said, tries = len(client.problems), server.asked + names.looked
        server.turned, names.turned = answer, name == "name"
        server.giving.clear()  # the cable of the stream that goes on
        await client.wait(lambda: len(client.problems) > said)
        problem = client.problems[-1]
        assert (problem["kind"], problem["node"]) == ("source", "3")
        # what is told at first may be that the stream has ended
        await client.wait(lambda: words in (client.stats["sources"]["3"]["reason"] or ""))
        assert "hidden" not in client.stats["sources"]["3"]["reason"]
        await client.wait(lambda: server.asked + names.looked >= tries + 2)
        server.turned, names.turned = None, False
        server.giving.set()
        seen = len(client.views)
        await client.wait(lambda: len(client.views) > seen + 3, 6)
        await client.wait(lambda: client.stats["sources"]["3"]["reason"] is None)

    async def work(http_):
        with inprocess.comfy() as (comfy, _):
            made = graph(source="address", address=f"http://localhost:{port}/film")
            client = await Client.start(http_, comfy.url, made)
            await client.wait(lambda: len(client.views) > 3)
            for name, (answer, words) in turns.items():
                await turn(client, name, answer, words)
            await client.stop()
            return client

    with contextlib.closing(elsewhere):
        client = inprocess.live(work)
        with pytest.raises(TimeoutError):
            elsewhere.accept()
    assert client.state == "ended" and client.stats["faults"]["source"] >= len(turns)
    assert {place for place in names.met if place[1] == port} == {("127.0.0.1", port)}
    assert not [place for place in names.met if place[0] == FORBIDDEN]
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("livediffusion-so")])
