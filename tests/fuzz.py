"""Hostile input, made from good input and a seed; and who watches what it makes a process do."""

import asyncio
import contextlib
import copy
import json
import logging
import random
import sys
import time

from aiohttp import web
from aiohttp.http import HttpProcessingError

NO_HTTP = HttpProcessingError, web.RequestPayloadError
DEEP = "deep"  # stands for 100,000 lists in each other, which no list can be copied or printed as
NASTY = (
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), float("-inf"), "", " ", "x", "\0", "a\0b", "\ud800", "\u00e4\u00f6", "\u202e",
    "..", "../outside/secret.json", "../../etc/passwd", "/etc/passwd", "C:\\x", "a:b",
    "x" * 300, "x" * 10_000, "[]", "{}", "__class__", "$(touch x)", [], {}, [[]], [{}], {"": {}},
    ["1", 0], ["1", -1], ["1", 10**9], ["nobody", 0], [[], 0], [{}, {}], [1, 2], [None, None],
    ["stranger_module", "call"], ["subprocess", "call"], ["os", "system"], ["builtins", "exec"],
    {"__value__": [1, 2]}, {"__value__": {"__value__": None}}, list(range(2000)), DEEP,
)  # fmt: skip


class Mutator:
    """Args: seed: the same seed, the same input."""

    def __init__(self, seed):
        self.rng = random.Random(seed)

    def nasty(self):
        return copy.deepcopy(self.rng.choice(NASTY))

    def value(self, good):
        """A copy of a JSON value with one to three of its parts replaced, doubled or taken out."""
        out = copy.deepcopy(good)
        for _ in range(self.rng.randint(1, 3)):
            out = self._once(out)
        return out

    def _once(self, value):
        places = list(_places(value))
        if not places or self.rng.random() < 0.05:
            return self.nasty()
        holder, key = self.rng.choice(places)
        what = self.rng.randrange(8)
        if what == 0:
            del holder[key]
        elif what == 1 and isinstance(holder, dict):
            holder[str(self.nasty())] = holder.pop(key)
        elif what == 2 and isinstance(holder, dict):
            holder[self.rng.choice(["extra", "", "__class__"])] = self.nasty()
        elif what == 3 and isinstance(holder[key], int | float):
            holder[key] = holder[key] * self.rng.choice([-1, 0, 1000, 1e300])
        else:
            holder[key] = self.nasty()
        return value

    def text(self, good):
        """A JSON text of a changed value, sometimes changed again as bytes."""
        data = encoded(self.value(good))
        return self.bytes(data) if self.rng.random() < 0.2 else data

    def bytes(self, data):
        """Bytes cut, doubled, flipped, or with some put in."""
        data = bytearray(data)
        for _ in range(self.rng.randint(1, 8)):
            at = self.rng.randrange(len(data) + 1)
            what = self.rng.randrange(5)
            if what == 0:
                del data[at:]
            elif what == 1:
                data[at:at] = data[: self.rng.randrange(200)]
            elif what == 2:
                data[at:at] = self.rng.randbytes(self.rng.randrange(1, 9))
            elif at < len(data):
                data[at] = self.rng.choice([0, 255, data[at] ^ 1 << self.rng.randrange(8)])
        return bytes(data)


def _places(value):
    todo = [value] if isinstance(value, list | dict) else []
    while todo:
        holder = todo.pop()
        for key in range(len(holder)) if isinstance(holder, list) else list(holder):
            yield holder, key
            if isinstance(holder[key], list | dict):
                todo.append(holder[key])


def encoded(value):
    """As JSON, with what Python writes beyond it (NaN), and DEEP as what it stands for."""
    text = json.dumps(value)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode()


async def raw(port, head, body=b""):
    """Send a request as bytes; the status of the answer, None where the server hung up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(head + body)
            await writer.drain()
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            line = await asyncio.wait_for(reader.readline(), 30)
            return int(line.split()[1]) if line.startswith(b"HTTP/1") else None
    finally:
        writer.close()
    return None


class Watch:
    """What this process opens, imports and starts, and what is logged with a traceback.

    Attributes:
        opened: paths.
        imported: names of modules, once it is over.
        started: commands.
        tracebacks: log records with one.
        slowest: (seconds of this process's own time, what) of the slowest `case`.
    """

    def __init__(self):
        self.opened, self.imported, self.started, self.tracebacks = set(), set(), [], []
        self.slowest = 0.0, ""
        self.cases = 0

    @contextlib.contextmanager
    def case(self, what):
        began = time.process_time()
        yield
        self.slowest = max(self.slowest, (time.process_time() - began, what))
        self.cases += 1


_watching = []


def _heard(event, values):
    if not _watching:
        return
    watch = _watching[-1]
    if event == "open" and isinstance(values[0], str | bytes):
        path = values[0]
        watch.opened.add(path if isinstance(path, str) else path.decode(errors="replace"))
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        watch.started.append(values)


@contextlib.contextmanager
def watched():
    """A Watch of everything that happens meanwhile, in all threads."""
    if not getattr(sys, "_livediffusion_audited", False):
        sys.addaudithook(_heard)  # there is no taking it away
        sys._livediffusion_audited = True
    watch = Watch()

    class Handler(logging.Handler):
        def emit(self, record):
            # a server says so of what is no HTTP, before or after a handler has seen it
            served = record.name == "aiohttp.server" and record.exc_info
            if served and isinstance(record.exc_info[1], NO_HTTP):
                return
            # and ComfyUI's executor of any node that raises, which is how a run ends in words
            if record.pathname.endswith("execution.py"):
                return
            if record.exc_info or "Traceback" in record.getMessage():
                watch.tracebacks.append(record.getMessage()[:300])

    handler = Handler()
    logging.getLogger().addHandler(handler)
    before = set(sys.modules)
    _watching.append(watch)
    try:
        yield watch
    finally:
        watch.imported = set(sys.modules) - before
        _watching.remove(watch)
        logging.getLogger().removeHandler(handler)
