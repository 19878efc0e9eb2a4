"""Processes and process groups: a supervisor that replaces dead workers, and workers that outlive each other."""
