"""The ``flowdistill`` command."""

from flowdistill.cli.commands import command, main

__all__ = ["command", "main"]
