"""Chat templates render as in transformers, and a hostile one costs a second and an error."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import transformers

from moebius.errors import ArgumentError, TokenizerError
from moebius.tokenizer import AutoTokenizer
from moebius.tokenizer.templates import TemplateRenderer
from tests.tokenizer_builders import save_folder

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is string and loop.index0 > ns.last %}
        {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {%- generation %}{{- message.content | default('') }}{%- endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n' }}{{- call.function | tojson(indent=2) }}{{- '\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

INSTRUCT = """\
{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] | trim + '\\n\\n' %}{% set loop_messages = messages[1:] %}
{% else %}
    {% set system = '' %}{% set loop_messages = messages %}
{% endif %}
{{ bos_token }}{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
    {% else %}
        {{ ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}
"""

DATED = "{{ strftime_now('%Y') }}{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m|tojson }}"
DATED += "{% endfor %}"

PROBING = """\
{%- set seen = 1 %}
{%- for m in messages %}
    {%- generation %}{%- set seen = 2 %}{{ loop.index }}{{ seen }}{%- endgeneration %}
    {{- seen }}{{ m.content is defined }}{{ m.tool_calls is defined }}{{ m.thinking is defined }}
{%- endfor %}"""

TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "<b>Wetter & é</b>", "parameters": {"type": "object"}},
}

CHATS = {
    "plain": [{"role": "user", "content": "Hi <there> & 専門家 🙂"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}],
    "turns": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "\nsay hello\n", "tool_calls": None},
        {"role": "user", "content": "Bye"},
    ],
    "reasoning": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "thinking": "hm"},
    ],
    "calls": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]},
    ],
}


@pytest.fixture(scope="module")
def load_both(tmp_path_factory):
    def load(template):
        folder = save_folder("byte_level_bpe", tmp_path_factory.mktemp("chat"), bos_token="<|endoftext|>")
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)

    return load


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", [CHATML, DATED, PROBING], ids=["chatml", "dated", "probing"])
@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True, "enable_thinking": False}, {"tools": [TOOL]}])
def test_rendered_text_and_ids_are_those_of_transformers(load_both, template, chat, options):
    ours, theirs = load_both(template)
    text = ours.apply_chat_template(chat, tokenize=False, **options)
    assert text == theirs.apply_chat_template(chat, tokenize=False, **options)
    assert dict(ours.apply_chat_template(chat, **options)) == dict(theirs.apply_chat_template(chat, **options))


@pytest.mark.parametrize("chat", ["plain", "system", "turns"])
def test_an_instruct_template_renders_as_in_transformers(load_both, chat):
    ours, theirs = load_both(INSTRUCT)
    text = ours.apply_chat_template(CHATS[chat], tokenize=False)
    assert text == theirs.apply_chat_template(CHATS[chat], tokenize=False)
    assert "<|endoftext|>" in text
    assert "[INST]" in text


def test_what_a_template_complains_of_reaches_the_caller(load_both):
    ours, _ = load_both(INSTRUCT)
    with pytest.raises(TokenizerError, match="roles must alternate"):
        ours.apply_chat_template([{"role": "assistant", "content": "Hi"}])


def test_several_conversations_are_padded_into_one_tensor(load_both):
    ours, theirs = load_both(CHATML)
    chats, options = [CHATS["plain"], CHATS["turns"]], {"padding": True, "return_tensors": "pt"}
    mine, reference = ours.apply_chat_template(chats, **options), theirs.apply_chat_template(chats, **options)
    assert mine.input_ids.tolist() == reference["input_ids"].tolist()
    assert mine.attention_mask.tolist() == reference["attention_mask"].tolist()
    ids = ours.apply_chat_template(CHATS["plain"], return_dict=False)
    assert ids == theirs.apply_chat_template(CHATS["plain"], return_dict=False)


def test_templates_stored_in_the_config_are_found_by_name(tmp_path):
    named = [{"name": "default", "template": "D{{ messages|length }}"}, {"name": "tool_use", "template": "T"}]
    ours = AutoTokenizer.from_pretrained(save_folder("word_level", tmp_path, chat_template=named))
    chat = CHATS["plain"]
    assert ours.apply_chat_template(chat, tokenize=False) == "D1"
    assert ours.apply_chat_template(chat, tools=[TOOL], tokenize=False) == "T"
    assert ours.apply_chat_template(chat, chat_template="tool_use", tokenize=False) == "T"
    assert ours.apply_chat_template(chat, chat_template="{{ 7 }}", tokenize=False) == "7"


def test_without_a_template_the_error_says_so(tmp_path):
    ours = AutoTokenizer.from_pretrained(save_folder("word_level", tmp_path))
    with pytest.raises(TokenizerError, match="no chat template"):
        ours.apply_chat_template(CHATS["plain"])


@pytest.mark.parametrize("messages", [[], ["Hi"], [None]])
def test_what_is_no_conversation_is_refused(load_both, messages):
    ours, _ = load_both(CHATML)
    with pytest.raises(TokenizerError):
        ours.apply_chat_template(messages)


@pytest.mark.parametrize("name", ["continue_final_message", "return_assistant_tokens_mask", "sanitize_control_tokens"])
def test_unsupported_arguments_are_refused_by_name(load_both, name):
    ours, _ = load_both(CHATML)
    with pytest.raises(ArgumentError, match=name):
        ours.apply_chat_template(CHATS["plain"], **{name: True})


ATTACKS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a billion characters": "{{ 'a' * 10**9 }}",
    "doubling text": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a power": "{{ (10**9) ** (10**9) }}",
    "a huge list": "{{ [1] * 10**9 }}",
    "a wide format": "{{ '%1000000000d' % 1 }}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "slow syntax": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "sorting": "{% for i in range(99999) %}{{ (range(99999)|sort|list)[0] }}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "attr filter": "{{ messages|attr('__class__') }}",
    "a namespace's internals": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "writing to the messages": "{{ messages.append(1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "not Jinja": "{% if %}",
}


@pytest.fixture(scope="module")
def renderer():
    return TemplateRenderer()


@pytest.mark.parametrize("template", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_ends_within_its_budget_and_the_next_render_works(template):
    renderer = TemplateRenderer()
    start, cpu = time.monotonic(), os.times()
    with contextlib.suppress(TokenizerError):
        assert renderer.render(template, {"messages": []}).strip() in ("", "1")  # some attacks come to nothing
    spent = os.times()
    # On a busy machine the wall clock says how busy it was; the budget is processor time.
    worker = spent.children_user + spent.children_system - cpu.children_user - cpu.children_system
    assert worker <= 1.3  # 0.9 for the render, the rest to start
    assert time.monotonic() - start <= 1.1 + 2 * os.getloadavg()[0]
    assert renderer.render("{{ x }}", {"x": "next"}) == "next"


def test_the_budget_is_a_renders_not_the_workers_life():
    renderer = TemplateRenderer(cpu_seconds=0.3)
    busy = "{% for i in range(70000) %}{% endfor %}done"
    for _ in range(3):
        start = os.times()
        while os.times().elapsed - start.elapsed < 0.2:
            assert renderer.render(busy, {}) == "done"


def test_one_worker_serves_all_renders_and_ends_with_its_renderer():
    renderer = TemplateRenderer()
    renderer.render("a", {})
    worker = renderer._worker
    renderer.render("b", {})
    assert renderer._worker is worker
    del renderer
    assert worker.returncode is not None


def test_the_worker_ends_with_its_parent():
    code = (
        "from moebius.tokenizer.templates import TemplateRenderer; import os\n"
        "r = TemplateRenderer(); r.render('a', {}); print(r._worker.pid, flush=True); os._exit(0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid, deadline = int(found.stdout), time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        if "zombie" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.01)
    assert time.monotonic() < deadline


def test_threads_share_a_worker_without_mixing_answers(renderer):
    answers = {}

    def ask(number):
        answers[number] = [renderer.render("{{ n }}", {"n": number}) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert answers == {number: [str(number)] * 20 for number in range(8)}


def test_the_worker_imports_neither_torch_nor_moebius(renderer):
    renderer.render("a", {})
    maps = Path(f"/proc/{renderer._worker.pid}/maps").read_text()
    assert "torch" not in maps


def test_values_that_json_cannot_carry_are_named_by_their_type(renderer):
    assert renderer.render("{{ x }}", {"x": object()}) == "<object>"
