"""`python -m hf_noisekd.cli`."""

import sys

from hf_noisekd.cli import main

sys.exit(main())
