"""`python -m epserve`: what the console script does, for the processes that serve starts."""

import sys

from epserve.cli import main

sys.exit(main())
