"""How many examples the fuzzers try: a few in `make test`, CALM_FUZZ_EXAMPLES in `make fuzz`."""

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
