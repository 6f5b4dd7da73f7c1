#!/usr/bin/env python3
"""The shape sweep from a checkout, installed or not: `python scripts/shape_sweep.py --suite quick`.

The same code and options as `jax-router sweep`; needs the packages of `pip install .[sweep]` or of `make sweep`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jax_router.sweep import main

if __name__ == "__main__":
    main()
