"""What the supervisor and its workers tell each other, and how it travels."""
