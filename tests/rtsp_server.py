"""An RTSP server: who publishes (ANNOUNCE, RECORD) is passed on to who plays, over TCP (RFC 2326).

The packets are FFmpeg's own; the server looks into none. It can ask for a login, lead elsewhere,
say nothing, and let its connections be cut.
"""

import base64
import contextlib
import hashlib
import re
import socket
import threading


class RtspServer:
    """Args:
    login: (user, password) that who plays needs to know, by Digest, or by Basic.
    redirect: where DESCRIBE is led to.

    Attributes:
        port: on 127.0.0.1.
        heard: first lines and headers that players sent.
        players: how many play now.
        mute: nothing is passed on, and nothing answered, while it is set.
    """

    def __init__(self, login=None, scheme="digest", redirect=None, port=0, tls=None):
        self.login, self.scheme, self.redirect, self.tls = login, scheme, redirect, tls
        self.heard, self.mute = [], False
        self._sdp = b""
        self._players, self._all = [], []
        self._lock = threading.Lock()
        self._door = socket.create_server(("127.0.0.1", port))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"rtsp://127.0.0.1:{self.port}/film"

    @property
    def players(self):
        return len(self._players)

    @property
    def ready(self):
        return bool(self._sdp)

    def cut(self, players_only=True):
        """Reset the connections of who plays."""
        with self._lock:
            for one in list(self._players if players_only else self._all):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                one.close()
            self._players.clear()

    def close(self):
        self._door.close()
        for one in self._all:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self):
        while True:
            try:
                wire, _ = self._door.accept()
            except OSError:
                return
            self._all.append(wire)
            threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, wire):
        try:
            if self.tls:
                wire = self.tls.wrap_socket(wire, server_side=True)
                self._all.append(wire)
            self._talk(wire, wire.makefile("rb"))
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                if wire in self._players:
                    self._players.remove(wire)
            wire.close()

    def _talk(self, wire, stream):
        while first := stream.read(1):
            if first == b"$":
                head = stream.read(3)
                packet = first + head + stream.read(int.from_bytes(head[1:], "big"))
                self._pass_on(wire, packet)
                continue
            lines = [first + stream.readline()]
            while (line := stream.readline()).strip():
                lines.append(line)
            lines = [line.decode().strip() for line in lines]
            if not lines[0]:
                continue
            headers = dict(line.split(": ", 1) for line in lines[1:])
            body = stream.read(int(headers.get("Content-Length", 0)))
            method, url, _ = lines[0].split()
            if method not in ("ANNOUNCE", "RECORD"):
                self.heard.append("\n".join(lines))
            if not self.mute:
                self._answer(wire, method, url, headers, body)

    def _pass_on(self, sender, packet):
        if self.mute:
            return
        with self._lock:
            for one in list(self._players):
                if one is sender:
                    continue
                try:
                    one.sendall(packet)
                except OSError:
                    self._players.remove(one)

    def _answer(self, wire, method, url, headers, body):
        said, status, text = {}, "200 OK", b""
        publishes = getattr(self, "_publisher", None) is wire
        if method == "ANNOUNCE":
            self._publisher, self._sdp = wire, body
        proof = headers.get("Authorization", "")
        asks = self.login and not publishes and method in ("DESCRIBE", "SETUP", "PLAY")
        if asks and not self._knows(method, url, proof):
            asked = {"digest": 'Digest realm="test", nonce="0123abcd"',
                     "basic": 'Basic realm="test"'}[self.scheme]  # fmt: skip
            status, said = "401 Unauthorized", {"WWW-Authenticate": asked}
        if status != "200 OK":
            pass
        elif method == "OPTIONS":
            said["Public"] = "OPTIONS, DESCRIBE, SETUP, PLAY, GET_PARAMETER"
        elif method == "DESCRIBE":
            if self.redirect:
                status, said = "302 Moved", {"Location": self.redirect}
            elif not self._sdp:
                status = "404 Not Found"
            else:
                # not as asked: who plays has to take it from here
                said["Content-Base"], said["Content-Type"] = f"{self.url}/", "application/sdp"
                text = self._sdp
        elif method == "SETUP":
            said["Transport"], said["Session"] = headers["Transport"], "17;timeout=60"
        elif method in ("PLAY", "RECORD"):
            said["Session"] = "17"
        if text:
            said["Content-Length"] = len(text)
        lines = [f"RTSP/1.0 {status}", f"CSeq: {headers['CSeq']}"]
        lines += [f"{name}: {value}" for name, value in said.items()]
        with self._lock:
            wire.sendall("\r\n".join([*lines, "", ""]).encode() + text)
            if method == "PLAY" and status == "200 OK":
                self._players.append(wire)

    def _knows(self, method, url, proof):
        user, word = self.login
        if self.scheme == "basic":
            return proof == "Basic " + base64.b64encode(f"{user}:{word}".encode()).decode()
        fields = dict(re.findall(r'(\w+)="([^"]*)"', proof))

        def made(text):
            return hashlib.md5(text.encode()).hexdigest()

        wanted = made(f"{made(f'{user}:test:{word}')}:0123abcd:{made(f'{method}:{url}')}")
        return fields.get("username") == user and fields.get("response") == wanted and (
            fields.get("uri") == url
        )  # fmt: skip
