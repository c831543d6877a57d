"""``python -m flowdistill`` is the ``flowdistill`` command."""

import sys

from flowdistill.cli import main

if __name__ == "__main__":
    sys.exit(main())
