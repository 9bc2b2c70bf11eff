"""`python -m textrl_gym`: the command line."""

import sys

from textrl_gym.cli import main

sys.exit(main())
