"""What saves and restores cost, compared with the strongest peers: e.g. ``benchmarks.stall``, ``benchmarks.resume``."""
