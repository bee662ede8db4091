"""Chat templates render as Hugging Face's `apply_chat_template` does, in a sandbox."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from nanovllm.loader import resolve_model
from nanovllm.loader.chat_template import ChatTemplate, read_chat_template
from nanovllm.loader.tokenizer import Tokenizer

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": '  1 < 2 & "quoted" é 你好\n'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<é> & 'x'", "parameters": {"type": "object"}}}]

# In the manner of published templates: block trimming, namespaces, loop controls, tojson, thinking switches.
TEMPLATES = {
    "chatml with thinking": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}{%- set ns.last = messages|length - loop.index %}{%- break %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
""",
    "headers": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%Y") %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n" }}
{%- for tool in tools or [] %}{{- tool | tojson(indent=4) }}{%- endfor %}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "inst": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
    {% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{ (system + '\\n\\n' if loop.first and system else '') + message['content'] }} [/INST]
    {% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}
    {% endif %}
{% endfor %}
""",
}


def _theirs(template: str, **options: Any) -> str:
    backend = PreTrainedTokenizerFast(tokenizer_object=Backend(models.BPE()), **SPECIAL)
    return backend.apply_chat_template(copy.deepcopy(MESSAGES), chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "options",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "tools": TOOLS},
        {"add_generation_prompt": True, "enable_thinking": False, "date_string": "1 May"},
    ],
)
def test_equals_hugging_face(name: str, options: dict[str, Any]) -> None:
    ours = Tokenizer(Backend(models.BPE()), SPECIAL, ChatTemplate(TEMPLATES[name]))
    found = ours.apply_chat_template(MESSAGES, **options)
    assert found == _theirs(TEMPLATES[name], **options)
    assert '1 < 2 & "quoted" é 你好' in found


def test_smollm2() -> None:
    tokenizer = Tokenizer.from_source(resolve_model("smollm2"))
    assert tokenizer.chat_template is not None
    found = tokenizer.apply_chat_template(MESSAGES[1:2])
    assert found.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert found.endswith("你好\n<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(found, add_special_tokens=False)
    assert ids.count(1) == 3 and ids.count(2) == 2  # <|im_start|> and <|im_end|> became tokens
    assert not tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False).endswith("assistant\n")


def test_named_templates() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=TOOLS) == "tools"
    with pytest.raises(ValueError, match="no default chat template, only rag"):
        ChatTemplate({"rag": "x"}).render(MESSAGES)


def test_variables_that_no_template_reads_are_named(caplog: pytest.LogCaptureFixture) -> None:
    thinking, headers, inst = (ChatTemplate(TEMPLATES[name]) for name in TEMPLATES)
    thinking.check_names({"enable_thinking": False, "tools": None})
    headers.check_names({"tools": TOOLS, "date_string": "1 May", "bos_token": ""})
    assert not caplog.records
    with pytest.raises(TypeError, match="chat_template_kwargs has no parameter 'enable_thinkng'; did you mean 'enable"):
        thinking.check_names({"enable_thinkng": False})
    for name in ("messages", "add_generation_prompt"):
        with pytest.raises(TypeError, match=f"chat_template_kwargs has no parameter '{name}'"):
            inst.check_names({name: []})
    for _ in range(2):  # said once; and tools would never reach the model
        inst.check_names({"tools": TOOLS, "enable_thinking": False})
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "the chat template reads no variable 'tools'",
        "the chat template reads no variable 'enable_thinking'",
    ]
    caplog.clear()
    ChatTemplate("{{ messages }}{{ raise_exception('') }}{% set x = range(1) %}").check_names({"x": 1})
    assert caplog.records[0].getMessage().endswith("(it reads: none)")


def test_errors() -> None:
    with pytest.raises(ValueError, match="no chat template: pass chat_template="):
        Tokenizer(Backend(models.BPE()), {}).apply_chat_template(MESSAGES)
    with pytest.raises(ValueError, match="syntax error on line 2"):
        ChatTemplate("\n{% if %}")
    with pytest.raises(ValueError, match="cannot render these messages: roles must alternate"):
        ChatTemplate(TEMPLATES["inst"]).render(MESSAGES[2:], bos_token="")
    with pytest.raises(ValueError, match="cannot render these messages"):
        ChatTemplate("{{ messages[0].content + 1 }}").render(MESSAGES)
    with pytest.raises(ValueError, match='"role" and "content", got \'hello\''):
        ChatTemplate("x").render(["hello"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_templates_run_in_a_sandbox(attack: str) -> None:
    messages = list(MESSAGES)
    with pytest.raises(ValueError, match="cannot render"):
        ChatTemplate(attack + "{{ undefined.attribute }}").render(messages)
    assert messages == MESSAGES


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{% for i in range(10**9) %}{% endfor %}", "{{ 'x' * 10**15 }}"])
def test_whatever_a_template_raises_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="the chat template cannot render these messages"):
        ChatTemplate(text).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("configured", [5, [5], [{"name": "default"}], {"default": 5}])
def test_a_configured_template_that_is_none(configured: Any) -> None:
    with pytest.raises(ValueError, match="the model's chat_template is no text"):
        read_chat_template(None, None, configured)
