"""How long the fuzzers search: a moment in `make test`, and as CALM_FUZZ_EXAMPLES says in `make fuzz`."""

import os
from datetime import timedelta

from hypothesis import HealthCheck, settings

_EXAMPLES = os.environ.get("CALM_FUZZ_EXAMPLES")
BUDGET = settings(
    max_examples=int(_EXAMPLES or 20),
    derandomize=_EXAMPLES is None,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
