"""`python -m gptfast`."""

import sys

from gptfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
