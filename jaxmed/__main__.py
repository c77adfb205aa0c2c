"""Let `python -m jaxmed` be the command line."""

import sys

from jaxmed.cli import main

sys.exit(main())
