"""``python -m mlx_lm_skiphead``: the command line."""

import sys

from .cli import main

sys.exit(main())
