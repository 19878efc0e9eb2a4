"""``python -m lightning_scar`` is the command ``lightning-scar``."""

import sys

from lightning_scar.core.platforms import supervisor_refusal


def main() -> None:
    """Run the command."""
    if sys.argv[1:2] != ["run"]:
        from lightning_scar import cli

        cli.main()
    if (refusal := supervisor_refusal()) is not None:
        sys.exit(f"lightning-scar: {refusal}")
    # Its arguments include the script's own, which jsonargparse must not parse. It imports no torch before it must.
    from lightning_scar.elastic.supervisor import command_line

    try:
        sys.exit(command_line.main(sys.argv[2:]))
    except (OSError, ValueError) as error:
        sys.exit(f"lightning-scar: {error}")


if __name__ == "__main__":
    main()
