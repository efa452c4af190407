from __future__ import annotations

from hypothesis import settings

settings.register_profile("millrace", derandomize=True, database=None)
settings.load_profile("millrace")
