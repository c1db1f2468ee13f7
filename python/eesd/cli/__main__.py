"""`python -m eesd.cli`."""

import sys

from eesd.cli import main

sys.exit(main())
