"""Chat templates as checkpoints bring them, equal to what transformers makes of them."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from gateway.http.chat_template import ChatTemplate
from moe_core.errors import CheckpointError, RequestError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>&</b> é"},
    {"role": "assistant", "content": "yes"},
]
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}\n    {% if loop.index0 == 1 %}\n        {% continue %}\n    {% endif %}\n"
    "    {{- m.role }}\n    {% if m.role == 'assistant' %}{% break %}{% endif %}\n{% endfor %}\n",
    "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{{ strftime_now('%Y') | length }}{% if add_generation_prompt %}>{% endif %}{{ thinking }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("opening", [True, False])
def test_templates_render_as_in_transformers(source: str, opening: bool) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    from tokenizers import Tokenizer, models

    oracle = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), **tokens
    )
    expected = oracle.apply_chat_template(
        MESSAGES,
        chat_template=source,
        tokenize=False,
        add_generation_prompt=opening,
        thinking="deep",
    )
    template = ChatTemplate(source, tokens, "here")
    given = {"thinking": "deep"}
    assert template.render(MESSAGES, add_generation_prompt=opening, variables=given) == expected


def test_what_a_template_refuses_is_told() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {}, "here")
    with pytest.raises(RequestError, match=r"^messages: .*roles must alternate"):
        template.render(MESSAGES)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[9].content }}",
        "{{ range(10000000) | list }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_what_a_template_cannot_do_is_the_requests_error(source: str) -> None:
    with pytest.raises(RequestError, match="^messages: "):
        ChatTemplate(source, {}, "here").render(MESSAGES)


def test_the_conversation_itself_is_no_variable() -> None:
    with pytest.raises(RequestError, match="^chat_template_kwargs: messages cannot be set there"):
        ChatTemplate("x", {}, "here").render(MESSAGES, variables={"messages": []})


def write_config(directory: Path, **values: object) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(values))


def test_a_file_of_its_own_counts_more_than_the_tokenizers_config(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path) is None
    write_config(tmp_path, bos_token={"content": "<s>"}, eos_token="</s>", pad_token=None)
    assert ChatTemplate.from_directory(tmp_path) is None
    write_config(tmp_path, bos_token={"content": "<s>"}, chat_template="{{ bos_token }}old")
    assert ChatTemplate.from_directory(tmp_path).render(MESSAGES) == "<s>old"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}new")
    assert ChatTemplate.from_directory(tmp_path).render(MESSAGES) == "<s>new"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_config(tmp_path, chat_template=named)
    assert ChatTemplate.from_directory(tmp_path).render(MESSAGES) == "d"


def test_a_template_with_a_mistake_is_refused_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: is no chat template"):
        ChatTemplate.from_directory(tmp_path)
