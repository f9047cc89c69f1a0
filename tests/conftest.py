"""Settings that all tests share."""

from __future__ import annotations

import os

from hypothesis import settings

# The same examples on every run, so that a test fails for the change that breaks it; SIMLLM_EXPLORE=1 looks for more.
settings.register_profile("steady", derandomize=True, max_examples=40)
settings.register_profile("explore", max_examples=400)
settings.load_profile("explore" if os.environ.get("SIMLLM_EXPLORE") else "steady")
