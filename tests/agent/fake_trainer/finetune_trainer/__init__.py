"""Stands in for the trainer where what it trains is not at stake: imports nothing, runs the lines of scripts/worker.py."""
