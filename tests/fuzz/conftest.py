"""The budget of fuzzers: small and always the same, or what CALM_FUZZ_EXAMPLES says and each time anew."""

import os

from hypothesis import HealthCheck, settings

_EXAMPLES = os.environ.get("CALM_FUZZ_EXAMPLES")
settings.register_profile(
    "fuzz",
    max_examples=int(_EXAMPLES or 5),
    derandomize=_EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
