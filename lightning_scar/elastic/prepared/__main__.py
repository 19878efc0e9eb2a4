"""Runs a process that forks workers: ``python -m lightning_scar.elastic.prepared program ...``."""

from lightning_scar.elastic.prepared.parent import main

main()
