"""Shared by cases that run in Triton's interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from old_interpreter import repair

repair()
