"""Renders chat templates in a process of its own: `python template_process.py`, one JSON object per line.

It imports nothing from this package, which would take seconds.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

_EXTRA_MEMORY = 1 << 29  # Bytes beyond what the process uses when it is ready.


def main() -> None:
    """Answer each line until the input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # Nothing but answers may go to standard output.
    from transformers.utils.chat_template_utils import render_jinja_template  # noqa: PLC0415

    _limit_memory()
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            answer = _render(render_jinja_template, json.loads(line))
        except Exception as error:
            answer = {"error": (str(error) or type(error).__name__)[:1000]}
        print(json.dumps(answer), file=answers, flush=True)


def _render(render: Any, request: dict[str, Any]) -> dict[str, str]:
    texts, _ = render(**request["arguments"], **request["special_tokens"])
    limit = request["max_characters"]
    if len(texts[0]) > limit:
        return {"error": f"its output has {len(texts[0])} characters, and at most {limit} are allowed"}
    return {"text": texts[0]}


def _limit_memory() -> None:
    """Make larger allocations fail with a MemoryError, on systems that report how much memory is in use."""
    try:
        import resource  # noqa: PLC0415 (not on Windows)

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + _EXTRA_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()
