"""``python -m lightning_scar`` is the command ``lightning-scar``."""

from lightning_scar.cli import main

if __name__ == "__main__":
    main()
