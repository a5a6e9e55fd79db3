"""A live run: graph split, frame loop, mailboxes, codecs, routes."""
