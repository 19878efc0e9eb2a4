"""The front door of Lightning's Trainer."""
