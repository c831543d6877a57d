"""``python -m flowdistill`` is the ``flowdistill`` command."""

from flowdistill.cli.commands import command

if __name__ == "__main__":
    command()
