"""A replica's port: the pack's live protocol for whoever has a ticket."""
