"""`python -m spem` is the command `spem`."""

import sys

from spem.cli import main

if __name__ == "__main__":
    sys.exit(main())
