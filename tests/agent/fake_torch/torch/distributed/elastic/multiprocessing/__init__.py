"""See distributed/run.py."""
