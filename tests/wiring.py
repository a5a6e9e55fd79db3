"""A cable that a test has in its hand: a port on loopback that leads to another, pulled and put
back in; for TCP, and for UDP.
"""

import contextlib
import select
import socket
import threading

RESET = b"\1\0\0\0\0\0\0\0"


class Wiring:
    """Args:
    port: where it leads, on 127.0.0.1.
    udp: datagrams.

    Attributes:
        port: where it begins.
        state: "in"; "reset": connections are cut, new ones refused; "still": nothing passes, new
            connections are taken and hear nothing.
    """

    def __init__(self, port, udp=False):
        self._to, self._udp = port, udp
        self.state = "in"
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        self._door = socket.socket(socket.AF_INET, kind)
        self._door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._door.bind(("127.0.0.1", 0))
        self.port = self._door.getsockname()[1]
        self._pairs, self._over = {}, threading.Event()
        self.met = 0  # connections so far
        if not udp:
            self._door.listen(16)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pull(self, how):
        self.state = how

    def plug(self):
        self.state = "in"

    def close(self):
        self._over.set()
        self._thread.join(5)

    def _run(self):
        carry = self._datagrams if self._udp else self._connections
        with contextlib.closing(self._door):
            while not self._over.is_set():
                carry()
            self._cut()

    def _cut(self):
        for one in list(self._pairs):
            if not self._udp:
                with contextlib.suppress(OSError):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.close()
        self._pairs.clear()

    def _connections(self):
        before = getattr(self, "_before", "in")
        self._before = state = self.state
        if state != before:
            # what hung is gone for good, as after a restart at the other end
            self._cut()
        ends = list(self._pairs) if state == "in" else []
        ready, _, _ = select.select([self._door, *ends], [], [], 0.02)
        for one in ready:
            if one is self._door:
                self._meet(state)
            elif one in self._pairs:
                other = self._pairs[one]
                try:
                    data = one.recv(2**16)
                    if data:
                        other.sendall(data)
                        continue
                except OSError:
                    pass
                for end in (one, other):
                    self._pairs.pop(end, None)
                    end.close()

    def _meet(self, state):
        near, _ = self._door.accept()
        if state == "reset":
            near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            near.close()
            return
        if state == "still":
            self._pairs[near] = near
            return
        try:
            far = socket.create_connection(("127.0.0.1", self._to), 2)
        except OSError:
            near.close()
            return
        self.met += 1
        self._pairs[near], self._pairs[far] = far, near

    def _datagrams(self):
        ready, _, _ = select.select([self._door, *self._pairs], [], [], 0.02)
        for one in ready:
            with contextlib.suppress(OSError):
                data, sender = one.recvfrom(2**16)
                if self.state != "in":
                    continue
                if one is not self._door:
                    self._door.sendto(data, self._pairs[one])
                    continue
                far = next((s for s, a in self._pairs.items() if a == sender), None)
                if far is None:
                    far = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                    far.connect(("127.0.0.1", self._to))
                    self._pairs[far] = sender
                far.send(data)
