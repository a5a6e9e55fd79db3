"""A workflow as visitors have it: what they see, what they may set, the prompt for it."""
