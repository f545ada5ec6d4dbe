"""The `headrace` command. Prints for people, or with --json for programs."""

from cluster.cli.app import main

__all__ = ["main"]
