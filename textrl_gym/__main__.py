"""`python -m textrl_gym`: the command line."""

import sys

from textrl_gym.cli.main import main

sys.exit(main())
