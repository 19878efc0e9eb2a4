"""All that one card can show: ``python -m tests.gpu``, or ``make gpu``."""
