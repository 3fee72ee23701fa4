"""`python -m mamba_rsst`, which `accelerate launch -m mamba_rsst` also runs."""

import sys

from .cli import main


sys.exit(main())
