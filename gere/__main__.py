"""`python -m gere`, for launchers that start modules."""

from __future__ import annotations

import sys

from gere.cli.main import main

sys.exit(main())
