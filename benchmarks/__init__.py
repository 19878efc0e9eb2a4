"""What saves and restores cost, beside the strongest peers: ``benchmarks.stall`` and ``benchmarks.resume``."""
