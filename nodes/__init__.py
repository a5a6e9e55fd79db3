"""Adapters: each node is a schema and a few lines that call a room below."""
