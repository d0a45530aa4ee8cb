"""``python -m cryoalign``, for ``torchrun -m cryoalign``."""

import sys

from cryoalign.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
