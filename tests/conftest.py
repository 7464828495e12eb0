"""For every test: one thread, no network, and no deadline on property tests, whose speed is the
machine's affair.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
