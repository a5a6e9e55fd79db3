"""Encryption of SRT: AES in counter mode, keys wrapped by what a passphrase makes.

After draft-sharabayko-srt-01, sections 3.2.2 and 6. Needs the package cryptography, which is
imported when there is a passphrase.
"""

import hashlib
import importlib.util
import secrets
import struct

from .faults import Refused

_HEAD = 0x12202900  # version 1, keying material, HAI's sign; the last two bits say which keys
_CTR, _SRT = 2, 2  # AES in counter mode, MPEG-TS over SRT
_ROUNDS = 2048  # of PBKDF2
EVEN, ODD = 1, 2


class Keys:
    """Of one connection, both ways.

    Args:
        passphrase: 10 to 79 bytes.
        size: of the key, bytes: 16, 24 or 32.
    """

    def __init__(self, passphrase: str, size: int):
        self._passphrase, self._size = passphrase.encode(), size
        own = secrets.token_bytes(16), secrets.token_bytes(size)
        self._known = {EVEN: own}  # salt and key, by which it is

    @staticmethod
    def check() -> None:
        """Raises Refused: the package is missing."""
        if importlib.util.find_spec("cryptography") is None:
            raise Refused("address: a passphrase needs a package: pip install cryptography")

    def message(self) -> bytes:
        """Our key, wrapped, as the handshake carries it."""
        from cryptography.hazmat.primitives.keywrap import aes_key_wrap

        salt, key = self._known[EVEN]
        head = struct.pack(
            ">IIBBBBHBB", _HEAD | EVEN, 0, _CTR, 0, _SRT, 0, 0, len(salt) // 4, self._size // 4
        )
        return head + salt + aes_key_wrap(self._wrapping(salt, self._size), key)

    def take(self, message: bytes) -> bool:
        """New keys of the other end's. False: it is no such message, or of another passphrase."""
        from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap

        if len(message) < 16:
            return False
        head, _, cipher, _, _, _, _, salted, size = struct.unpack(">IIBBBBHBB", message[:16])
        which, size, salted = head & 3, 4 * size, 4 * salted
        wrapped = message[16 + salted :]
        if head & ~3 != _HEAD or not which or cipher != _CTR or size not in (16, 24, 32):
            return False
        salt = message[16 : 16 + salted]
        if len(salt) != 16 or len(wrapped) != 8 + size * (2 if which == 3 else 1):
            return False
        try:
            keys = aes_key_unwrap(self._wrapping(salt, size), wrapped)
        except InvalidUnwrap:
            return False
        for name in [n for n in (EVEN, ODD) if which & n]:
            self._known[name] = salt, keys[:size]
            keys = keys[size:]
        return True

    def coded(self, number: int, payload: bytes) -> bytes:
        """The payload of the packet of that number, with our key."""
        return self._run(EVEN, number, payload)

    def plain(self, number: int, payload: bytes, which: int) -> bytes | None:
        """None: there is no such key."""
        return self._run(which, number, payload) if which in self._known else None

    def _wrapping(self, salt: bytes, size: int) -> bytes:
        return hashlib.pbkdf2_hmac("sha1", self._passphrase, salt[-8:], _ROUNDS, size)

    def _run(self, which: int, number: int, payload: bytes) -> bytes:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        salt, key = self._known[which]
        start = int.from_bytes(salt[:14], "big") ^ number
        coder = Cipher(algorithms.AES(key), modes.CTR(start.to_bytes(14, "big") + b"\0\0"))
        return coder.encryptor().update(payload)
