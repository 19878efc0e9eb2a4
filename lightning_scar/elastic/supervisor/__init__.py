"""The supervisor, ``lightning-scar run``: it starts workers, watches them and replaces those that die."""
