"""Starts workers, watches them and replaces those that die: ``lightning-scar run``."""
