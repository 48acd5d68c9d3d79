"""`python -m resumable_trainer` is the command line."""

import sys

from resumable_trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
