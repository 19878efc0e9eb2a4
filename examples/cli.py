"""Everything from flags and YAML.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --trainer.callbacks.fraction=0.25
"""

from lightning.pytorch.cli import LightningCLI

from digits import DigitClassifier, Digits


def main() -> None:
    # A restarted run finds its own config file in the log folder.
    LightningCLI(DigitClassifier, Digits, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
