"""The objects that a job needs, as values made from values."""
