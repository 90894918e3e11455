"""Chat templates: like Hugging Face's renderer, and safe from what a hostile template or conversation can do."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from shoal.errors import ModelError, RequestError
from shoal.frontend import template_sandbox
from shoal.frontend.chat_template import ChatTemplate, normalise_messages

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüß dich,\n你好 👋  "},
    {"role": "assistant", "content": "  Hallo!\n"},
    {"role": "user", "content": "{{ 7*7 }}{% raise %}"},
]
FEATURES = (
    CHATML,
    "{%- for m in messages %}\n    {%- if loop.first %}\n  first\n    {%- endif %}\n"
    "{{ m.content | trim }}\n{%- endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }};{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ loop.index0 }}{% endfor %}",
    "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ documents | tojson(sort_keys=true) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content|length %}{% endfor %}"
    "{{ ns.n }}",
    "{% macro show(m) %}[{{ m.role ~ ':' ~ m.content ~ 1 ~ none }}]{% endmacro %}{% for m in messages %}{{ show(m) }}"
    "{% endfor %}",
    "{{ bos_token }}{{ missing }}{{ flag }}{% if unset is defined %}x{% endif %}{{ messages | length }}",
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages[1:] | length }}{{ messages[-1].role }}",
    "{{ ','.join(messages | map(attribute='content')) }}{{ messages | join('-', attribute='role') }}"
    "{{ 'ab' | join(1) }}",
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }}"
    "{{ loop.revindex }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}",
    "{{ messages[0].content.split(' ') }}{{ messages[1].content.strip().upper().replace('H', 'J') }}{{ 'a' * 3 }}",
    "{{ '%s-%d' % ('x', 3) }}{{ '%03d'|format(7) }}{{ '{:>4}'.format('y') }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}",
    "{% set x %}{{ messages[0].role }}!{% endset %}{{ x }}{% filter upper %}abc{{ x }}{% endfilter %}",
    "{{ dict(a=1, b=[2]) | tojson }}{{ {'k': messages[0]}.k.role }}{% for k, v in dict(a=1).items() %}{{ k }}{{ v }}"
    "{% endfor %}{{ [1, 2] + [3] }}{{ range(3) | list }}",
    "{% macro wrap() %}<{{ caller(1) }}>{% endmacro %}{% call(x) wrap() %}{{ x }}{% endcall %}",
)
TOOLS = [
    {"type": "function", "function": {"name": "f<>&'", "description": "é", "parameters": {"type": "object"}}}
]


def reference(source: str, messages: list[dict[str, Any]], **more: Any) -> str:
    rendered: list[list[str]] = render_jinja_template([messages], chat_template=source, **more)
    return rendered[0][0]


@pytest.mark.parametrize("source", FEATURES)
@pytest.mark.parametrize("prompt", [True, False])
def test_features_render_as_hugging_face_does(source: str, prompt: bool) -> None:
    documents = [{"title": "t", "text": "x"}]
    ours = ChatTemplate(source, {"bos_token": "<s>"}).render(
        MESSAGES, add_generation_prompt=prompt, tools=TOOLS, documents=documents, flag=True
    )
    theirs = reference(
        source,
        MESSAGES,
        add_generation_prompt=prompt,
        tools=TOOLS,
        documents=documents,
        flag=True,
        bos_token="<s>",
    )
    assert ours == theirs


@pytest.mark.parametrize("source", [CHATML, FEATURES[1]])
@pytest.mark.parametrize("last", ["Sure, ", "  it is\n", "word"])
def test_the_last_message_can_be_continued(source: str, last: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": last}]
    ours = ChatTemplate(source, {}).render(messages, continue_final_message=True)
    assert ours == reference(source, messages, continue_final_message=True)


def test_continuing_needs_a_message_that_is_shown() -> None:
    with pytest.raises(RequestError, match="does not show the last message"):
        ChatTemplate("x", {}).render(MESSAGES, continue_final_message=True)
    with pytest.raises(RequestError, match="with content to continue"):
        ChatTemplate(CHATML, {}).render([{"role": "assistant", "content": None}], continue_final_message=True)


def test_request_arguments_win_over_special_tokens_but_not_over_messages() -> None:
    template = ChatTemplate("{{ bos_token }}{{ messages | length }}", {"bos_token": "<s>"})
    assert template.render(MESSAGES, bos_token="<b>") == "<b>4"


def test_a_template_for_tools_is_used_with_tools() -> None:
    template = ChatTemplate("plain", {}, tool_source="tools")
    assert [
        template.render(MESSAGES),
        template.render(MESSAGES, tools=[]),
        template.render(MESSAGES, tools=TOOLS),
    ] == [
        "plain",
        "plain",
        "tools",
    ]


def test_no_template_is_the_client_s_error() -> None:
    template = ChatTemplate(None, {})
    assert not template.exists
    with pytest.raises(RequestError, match=r"no chat template: use /v1/completions.*--chat_template") as caught:
        template.render(MESSAGES)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_content_becomes_one_string() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "\u00e9 "}, "b"]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "tool_calls": [1]},
        {"role": "x", "content": ""},
    ]
    assert [message["content"] for message in normalise_messages(messages)] == ["aé b", "", ""]
    assert normalise_messages(messages)[1]["tool_calls"] == [1]
    assert messages[0]["content"] is parts


def test_null_fields_are_as_absent_ones() -> None:
    source = "{{ messages[0].tool_calls is defined }}{{ messages[0].name is defined }}"
    assert ChatTemplate(source, {}).render([{"role": "user", "tool_calls": None, "name": "n"}]) == "FalseTrue"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "must be a string or a list"),
        ({"type": "text", "text": "x"}, "must be a string or a list"),
        (
            [{"type": "image_url", "image_url": {"url": "x"}}],
            r"messages\[1\]\.content\[0\] has type 'image_url'",
        ),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": 1}], r"content\[1\]\.text must be a string"),
        ([None], "has type None"),
    ],
)
def test_other_content_is_refused_by_name(content: object, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        normalise_messages([MESSAGES[0], {"role": "user", "content": content}])
    assert (caught.value.status, caught.value.param) == (400, "messages[1].content")


def test_no_messages_are_refused() -> None:
    with pytest.raises(RequestError, match="messages is empty"):
        ChatTemplate(CHATML, {}).render([])


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% nonsense %}", "{{ '" + "x" * (1 << 20) + "' }}", "{{" + "(" * 5000]
)
def test_broken_templates_are_start_errors(source: str) -> None:
    with pytest.raises(ModelError, match=r"^FILE: the chat template"):
        ChatTemplate(source, {}, origin="FILE: ")


def test_a_template_from_a_file(tmp_path: Path) -> None:
    class Tokenizer:
        chat_template, tool_template, special_tokens = "own", None, {"bos_token": "<s>"}

    path = tmp_path / "t.jinja"
    path.write_text("{{ bos_token }}file")
    assert ChatTemplate.of(Tokenizer()).render(MESSAGES) == "own"  # type: ignore[arg-type]
    assert ChatTemplate.of(Tokenizer(), str(path)).render(MESSAGES) == "<s>file"  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="--chat_template"):
        ChatTemplate.of(Tokenizer(), str(tmp_path))  # type: ignore[arg-type]


HOSTILE = {
    "refused": "{{ raise_exception('roles must alternate') }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation by the class": "{{ dict.update(messages[0], role='x') }}",
    "include": "{% include '/etc/passwd' %}",
    "lipsum": "{{ lipsum(100) }}",
    "wide range": "{{ range(10000000) }}",
    "wide product": "{{ 'a' * 1000000000 }}",
    "wide list": "{{ ([0] * 10000000) * 10000000 }}",
    "wide number": "{{ 10 ** 1000000000 }}",
    "wide format": "{{ '%999999999d' % 1 }}",
    "wide format filter": "{{ '%999999999d' | format(1) }}",
    "wide format method": "{{ '{:>999999999}'.format(1) }}",
    "wide method": "{{ 'x'.center(1000000000) }}",
    "wide filter": "{{ 'x' | center(1000000000) }}",
    "wide replace": "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "wide replace filter": "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
    "wide join": "{{ (['x' * 1000000] * 1000000) | join }}",
    "wide join of a generator": "{{ (['x' * 1000000] * 1000) | map('upper') | join }}",
    "wide join method": "{{ ''.join((['x' * 1000000] * 1000) | map('upper')) }}",
    "wide translation": "{{ ('x' * 100000).translate({120: 'y' * 1000000}) }}",
    "doubling by +": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by set": "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "wide output": "{% set x = 'x' * 10000000 %}{% for i in range(100) %}{{ x }}{% endfor %}",
    "nothing": "{{ nothing.at.all }}",
    "wrong type": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_refusal(name: str) -> None:
    with pytest.raises(RequestError, match=r"chat template refuses this conversation: .") as caught:
        ChatTemplate(HOSTILE[name], {}).render(MESSAGES)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(9999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ ([[1] * 1000] * 100000) | tojson }}",
    ],
)
def test_endless_templates_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_RENDER_S", 0.05)
    with pytest.raises(RequestError, match="takes too long"):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_conversation_is_data_whatever_it_says() -> None:
    rng = random.Random()
    texts = ["".join(rng.choices("{}%#-'\"\\<>|~ a\n\u2028", k=40)) for _ in range(50)]
    messages = [{"role": "user", "content": text} for text in texts]
    assert ChatTemplate("{{ messages | map(attribute='content') | list | tojson }}", {}).render(
        messages
    ) == json.dumps(texts, ensure_ascii=False)
