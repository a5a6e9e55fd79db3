"""The one address: pages, visitors' sockets, the operator's page, the way to the gates."""
