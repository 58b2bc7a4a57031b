"""Chat templates rendered in a worker process with bounded time and memory."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moebius.errors import TokenizerError

CPU_SECONDS = 0.9  # a render; realistic templates take a few milliseconds
MEMORY_BYTES = 256 << 20
WORKER = Path(__file__).with_name("template_worker.py")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class TemplateRenderer:
    """Renders Jinja chat templates in one worker process, started at the first render and reused.

    A template that overruns its budget ends the worker, not the caller; the next render starts another. The worker ends
    with this object or with this process, whichever is first. Safe between threads; a forked child starts its own.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES):
        self._budget = (cpu_seconds, memory_bytes)
        self._command = [sys.executable, "-P", str(WORKER), str(cpu_seconds), str(memory_bytes)]
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._owner_pid = 0

    def __reduce__(self) -> tuple[type, tuple[float, int]]:
        """A copy, or one sent to another process, has the same budget and a worker of its own."""
        return type(self), self._budget

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """The text that `template` makes of `variables`, which must be JSON values.

        Raises TokenizerError: the template's own complaint, or that it took too long or too much memory.
        """
        request = json.dumps({"template": template, "variables": variables}, default=_placeholder)
        with self._lock:
            answer = self._exchange(request)
        if "error" in answer:
            raise TokenizerError(f"the chat template failed: {answer['error']}")
        return answer["text"]

    def _exchange(self, request: str) -> dict:
        worker = self._running_worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(request + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:
            self._discard()  # an interrupted exchange would leave its answer for the next request
            raise
        return json.loads(line) if line.endswith("\n") else {"error": self._obituary(worker)}

    def _running_worker(self) -> subprocess.Popen[str]:
        if self._worker is None or self._owner_pid != os.getpid():
            self._worker = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
            )
            self._owner_pid = os.getpid()
            weakref.finalize(self, _end, self._worker, self._owner_pid)
        return self._worker

    def _obituary(self, worker: subprocess.Popen[str]) -> str:
        self._discard()
        if worker.returncode == 1:
            return "the process that renders templates could not start; is jinja2 installed?"
        return f"it took more than {self._budget[0]} s of CPU time, or more than {self._budget[1] >> 20} MiB of memory"

    def _discard(self) -> None:
        if self._worker is not None:
            _end(self._worker, self._owner_pid)
        self._worker = None


def _end(worker: subprocess.Popen[str], owner_pid: int) -> None:
    if owner_pid != os.getpid():  # a forked child's copy: the worker is its parent's
        return
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # unsent bytes of a request whose worker is gone
                pipe.close()
    if worker.poll() is None:
        worker.kill()
    worker.wait()


def _placeholder(value: object) -> object:
    """What JSON cannot carry (images, arrays) is named by its type: templates look only whether it is there."""
    return f"<{type(value).__name__}>"


def prepare_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: fields that are None left out, reasoning under each name in use.

    Raises TokenizerError for an empty conversation or a message that is not a mapping.
    """
    if len(messages) == 0:
        raise TokenizerError("the conversation is empty", advice="give at least one message")
    return [_prepare_message(index, message) for index, message in enumerate(messages)]


def _prepare_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TokenizerError(f"message {index} is a {type(message).__name__}; expected a dict with role and content")
    fields = {key: value for key, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING_FIELDS if name in fields), None)
    if reasoning is None:
        return fields
    return {"thinking": reasoning, **fields, "reasoning_content": reasoning}
