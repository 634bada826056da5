"""How many cases each test draws. `make test` draws the same few each time, `make fuzz` thousands of others."""

import os

from hypothesis import HealthCheck, settings

CASES = int(os.environ.get("FUZZ_CASES", "0"))
"""Cases of each test; 0 for those of `make test`."""

common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("test", max_examples=60, derandomize=True, **common)
settings.register_profile("fuzz", max_examples=CASES or 1, **common)
settings.load_profile("fuzz" if CASES else "test")
