"""The process that renders chat templates, run as a script: a JSON line in, a JSON line out; it imports no Moebius.

A template comes with a checkpoint and is not to be trusted: Jinja's sandbox keeps it from Python's internals but does
not bound what it costs. So each render has a CPU budget that the kernel enforces (a profiling timer, whose signal ends
the process even in the middle of one long operation) and the whole process has an address-space limit. It ends at the
end of its standard input, that is with its parent.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MAX_TEXT_CHARS = 1 << 24


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words; they pass, in a scope of their own."""

    tags = {"generation"}  # noqa: RUF012 (the type that Jinja's Extension declares)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        tag = next(parser.stream)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=tag.lineno)


class TemplateNamespace(jinja2.utils.Namespace):
    """A namespace that refuses underscored names, which could reach Python's internals."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the underscored name {name!r}")
        super().__setitem__(name, value)


def raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def make_dict(*pairs: object, **values: object) -> dict:
    return dict(*pairs, **values)  # type: ignore[call-overload]


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which no prompt wants."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=make_dict, namespace=TemplateNamespace
    )
    return environment


@lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    return make_environment().from_string(source)


def render(request: dict) -> dict:
    """{"template", "variables"} -> {"text"}, or {"error"} in one line."""
    try:
        text = compiled(request["template"]).render(**request["variables"])
    except MemoryError:
        return {"error": "it needs more memory than a template may take"}
    except Exception as error:  # noqa: BLE001 (a template can raise anything that Python can)
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    if len(text) > MAX_TEXT_CHARS:
        return {"error": f"it rendered {len(text):,} characters; at most {MAX_TEXT_CHARS:,} are allowed"}
    return {"text": text}


def serve(cpu_seconds: float, memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        answer = json.dumps(render(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
