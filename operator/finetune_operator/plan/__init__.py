"""Decisions: functions from what is to what should be. No I/O, no clock, no logging, no ``await``."""
