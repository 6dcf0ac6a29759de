"""`python -m gptfast.cli`."""

import sys

from gptfast.cli import main

sys.exit(main())
