"""What runs on a MODEL: engines, what its weights are and where, what hangs on it."""
