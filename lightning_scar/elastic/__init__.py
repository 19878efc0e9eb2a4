"""Processes and process groups: a supervisor that replaces dead workers, and workers that survive each other."""
