"""Seeded random faults: a seed is a story of jobs and of what befalls them, and replays with one command.

``python -m tests.chaos --seed 17`` on the real cluster, ``python -m tests.chaos --plan --seed 17`` on the operator's decisions alone.
"""
