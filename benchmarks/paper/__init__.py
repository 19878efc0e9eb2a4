"""Both papers reproduced with the library's own code: ``python -m benchmarks.paper``."""
