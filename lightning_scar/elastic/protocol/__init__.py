"""The messages between the supervisor and its workers, and the logs that carry them."""
