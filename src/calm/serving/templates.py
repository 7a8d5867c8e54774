"""Chat templates are programs that come with a model; they are rendered in a process that can be killed.

In a thread of this process, a template that loops could not be stopped, and one that multiplies huge numbers
would block all threads.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

_PROGRAM = Path(__file__).with_name("template_process.py")
_BOOTSTRAP = "import sys, runpy; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"
_SECONDS_TO_START = 60.0
_SECRETS = ("CALM_API_KEY", "HF_TOKEN")


class TemplateProcess:
    """The process that renders chat templates, started when it is needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, request: dict[str, Any], seconds: float) -> str:
        """Render a conversation.

        Args:
            request: What the process is sent, see `template_process`.
            seconds: Time limit for the template.

        Raises:
            ValueError: If the template takes longer, or fails.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            answer = self._exchange(json.dumps(request), seconds)
        if answer is None:
            raise ValueError(f"it took more than {seconds:g} seconds or too much memory, and was stopped")
        if "error" in answer:
            raise ValueError(answer["error"])
        return str(answer["text"])

    def _start(self) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOTSTRAP, str(_PROGRAM), *sys.path],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the server; when that ends, so does this input.
        )
        if self._exchange(None, _SECONDS_TO_START) is None:
            raise RuntimeError("the process that renders chat templates did not start.")

    def _exchange(self, line: str | None, seconds: float) -> dict[str, Any] | None:
        """Send a line and wait for the reply; None if the process was killed or has ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            reply = process.stdout.readline()
            answer: dict[str, Any] = json.loads(reply)
        except (OSError, ValueError):  # The process has ended.
            process.kill()
            process.wait()
            self._process = None
            return None
        finally:
            timer.cancel()
        return answer


_PROCESS = TemplateProcess()  # One for all servers of this process.


def isolate_chat_template(tokenizer: PreTrainedTokenizerBase, max_characters: int, seconds: float) -> None:
    """Make a tokenizer render its chat template in the other process.

    Args:
        tokenizer: The tokenizer, which is modified.
        max_characters: Maximum length of the rendered text.
        seconds: Time limit.
    """

    def apply_chat_template(
        conversation: Sequence[dict[str, Any]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert not tokenize
        arguments = {
            "conversations": [list(conversation)],
            "chat_template": tokenizer.get_chat_template(),
            "add_generation_prompt": add_generation_prompt,
        }
        request = {
            "arguments": arguments,
            "special_tokens": tokenizer.special_tokens_map,
            "max_characters": max_characters,
        }
        return _PROCESS.render(request, seconds)

    tokenizer.apply_chat_template = apply_chat_template  # type: ignore[method-assign,assignment]
