"""What run.py needs before there is anything to run: source, environment, server."""
