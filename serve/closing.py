"""With what code a socket is closed whose other half was. Standard library only."""

GOING_AWAY = 1001  # what a page comes back after


def passed_on(code: int | None) -> int:
    """The code to say for the one that the far end said; None or one that may not be said: 1001.

    1000 would be the last word: a page does not come back after it.
    """
    if code == 1000 or 3000 <= (code or 0) < 5000:
        return code
    return GOING_AWAY
