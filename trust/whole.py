"""Files of ours that appear whole or not at all, and that are their owner's alone."""

import contextlib
import json
import os
import pathlib
from typing import Any


def write(
    path: pathlib.Path, value: Any, lasting: bool = True, by_hand: bool = False
) -> None:
    """Put a value into a file as JSON. Who is killed meanwhile leaves the file before.

    The folder is made if it is not there. Nobody but the user may read the file, where the file
    system knows users. Two writers of one file at a time may each find the other's.

    Args:
        lasting: it outlives a power cut, for which the disk is waited for.
        by_hand: people write in it, too: a line for each value.

    Raises:
        OSError: it cannot be written; the file before is as it was.
        ValueError: the value is none of JSON's.
    """
    shape = {"indent": 2} if by_hand else {"separators": (",", ":")}
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, **shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8", opener=_private) as file:
            file.write(text)
            if lasting:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
