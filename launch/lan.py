"""`run.py live --lan`: ComfyUI for the phones of this network, with a certificate of its own.

A browser gives its camera to https pages only. trustme makes an authority for this computer and a
certificate for its names; both are kept, so that who has let it pass once is not asked again.
Standard library only.
"""

import datetime
import os
import pathlib
import re
import shutil
import socket
import subprocess
import time
from typing import NamedTuple

from . import setup
from .console import Stop, watched
from .server import base

PACKAGES = ["trustme", "segno"]  # the certificate, and the code that a phone scans
DAYS = 397  # of a certificate; browsers take none that is good for longer than 398
RENEWED = 330  # days after which another is made
# reserved for documentation (RFC 5737): nothing is sent there, the system only says which way it is
ELSEWHERE = ("192.0.2.1", 9)


class Lan(NamedTuple):
    """Attributes:
    address: of this computer in its network.
    key, certificate, authority: files; the last is what a device may be told to trust.
    """

    address: str
    key: pathlib.Path
    certificate: pathlib.Path
    authority: pathlib.Path

    @property
    def options(self) -> list[str]:
        """ComfyUI's."""
        files = ["--tls-keyfile", str(self.key), "--tls-certfile", str(self.certificate)]
        return ["--listen", "0.0.0.0", *files]

    def told(self, port: int, path: str, how: str) -> str:
        """What the user reads.

        Args:
            how: what to do there, in lines.
        """
        return (
            f"\n  https://localhost:{port}{path}\n      on this computer\n"
            f"  https://{self.address}:{port}{path}\n"
            "      on phones and computers in its network\n\n"
            f"{how}\n"
            "  The certificate is this computer's own: each browser warns once. Choose\n"
            "  Advanced and go on (Safari: Show Details, visit this website). Who does not want\n"
            f"  to be asked installs and trusts {self.authority} there.\n\n"
            "  Whoever is in this network can use this ComfyUI now, and all that it can do.\n"
            "  Ctrl+C here ends it.\n"
        )


def prepared(python: pathlib.Path) -> Lan:
    """The certificate for this computer as it is named now, made where there is none yet.

    Args:
        python: of the environment, which gets what it takes.

    Raises:
        Stop: this computer is in no network, or it cannot be made.
    """
    address = own_address()
    if address is None:
        raise Stop("--lan: this computer is in no network. Connect it to the one of the phone.")
    with setup.setting_up():
        asked = [str(python), "-c", "import segno, trustme"]
        nothing = subprocess.DEVNULL
        if subprocess.run(asked, stderr=nothing, stdin=nothing).returncode:
            pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
            log = setup.CACHE / "lan.log"
            watched([*pip, *PACKAGES], f"installing {' and '.join(PACKAGES)}", log)
        place = made(python, names(address))
    return Lan(address, place / "server.key", place / "server.pem", place / "client.pem")


def made(python: pathlib.Path, identities: list[str]) -> pathlib.Path:
    """The folder with a certificate that is good for these names for some time yet."""
    place = base() / "lan" / setup.key(*identities)
    dated = place / "server.pem"
    if dated.is_file() and time.time() - dated.stat().st_mtime < RENEWED * 86400:
        return place
    shutil.rmtree(place, ignore_errors=True)
    until = datetime.date.today() + datetime.timedelta(days=DAYS)
    command = [str(python), "-m", "trustme", "-q", "-x", until.isoformat(), "-i", *identities]
    with setup.whole(place) as part:
        part.mkdir(mode=0o700)
        watched([*command, "-d", str(part)], "making a certificate", base() / "lan.log")
        os.chmod(part / "server.key", 0o600)
    return place


def names(address: str) -> list[str]:
    """By which this computer may be called."""
    host = socket.gethostname()
    called = [host, f"{host.partition('.')[0]}.local"]
    called = [one for one in called if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}", one)]
    return sorted({*called, address, "localhost", "127.0.0.1"})


def own_address() -> str | None:
    """This computer's address in its network; None where it is in none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)
            found = probe.getsockname()[0]
        except OSError:
            return None
    return None if found.startswith("127.") else found
