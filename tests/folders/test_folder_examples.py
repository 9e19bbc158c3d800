"""Files of examples, their tokens, and which of them are learned."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_folder import MIXED, TEMPLATE, chat, lines, tokenizer, transformers

from moekit.errors import UserError
from moekit.folder_text.encoding import Encoder, load_tokenizer
from moekit.folder_text.examples import Completion, Conversation, Example, PlainText, fingerprint, read_examples

# Of later Qwens: what was thought before is left out, and an empty thought is written before the last turn.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}<|user|>{{ m.content }}\n"
    "{% else %}{% set said = m.content.split('</think>')[-1] %}<|assistant|>\n{% if loop.index0 > ns.last %}<think>"
    "{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1] }}{% endif %}</think>"
    "{% endif %}{{ said }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# Of Phi: the end token stands once, behind the whole chat.
CLOSED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|system|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Calls of tools: behind the text (Hermes), in a line of their own (Qwen), in its place (Llama), not written at all.
_TURN = "<|{{ m.role if m.role == 'assistant' else 'user' }}|>"
_CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
_PROMPT = "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>"
BEHIND = f"{{% for m in messages %}}{_TURN}{{{{ m.content or '' }}}}{_CALLS}{_PROMPT}{{% endif %}}"
LINES = (
    f"{{% for m in messages %}}{_TURN}{{% if m.content %}}{{{{ '\n' + m.content }}}}{{% endif %}}"
    f"{{% if m.tool_calls %}}{{{{ '\n' }}}}{_CALLS}{{% endif %}}{_PROMPT}{{{{ '\n' }}}}{{% endif %}}"
)
INSTEAD = (
    f"{{% for m in messages %}}{_TURN}{{% if m.tool_calls %}}{_CALLS}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    f"{_PROMPT}{{% endif %}}"
)
NEVER = f"{{% for m in messages %}}{_TURN}{{{{ m.content or '' }}}}{_PROMPT}{{% endif %}}"

CALLS_MARKED = (
    f"{{% for m in messages %}}{_TURN}{{% if m.role == 'assistant' %}}{{% generation %}}{{{{ m.content }}}}{_CALLS}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def learned(example: Example, template: str | None = TEMPLATE, max_length: int = 200) -> tuple[str, list[str]]:
    """All that a model reads, and the stretches of it that it learns."""
    own = tokenizer(template)
    (one,) = Encoder(own, max_length=max_length, vocab_size=len(own)).encode([example]).examples
    stretches: list[list[int]] = []
    for number, (token, label) in enumerate(zip(one.ids, one.labels, strict=True)):
        assert label in (token, -100)
        if label != -100:
            if not stretches or number - 1 not in stretches[-1]:
                stretches.append([])
            stretches[-1].append(number)
    return own.decode(one.ids), [own.decode(one.ids[stretch]) for stretch in stretches]


def conversation(*turns: str, **more: Any) -> Conversation:
    return Conversation("chats, line 1", tuple(chat(*turns, **more)["messages"]))


@pytest.mark.parametrize(
    ("example", "template", "whole", "parts"),
    [
        # The first token is predicted by none.
        (PlainText("", "hé there"), None, "hé there</s>", ["é there</s>"]),
        (Completion("", "2 + 2 = ", "4"), None, "2 + 2 = 4</s>", ["4</s>"]),
        (
            conversation("a", "b", "c", "d e", system="s"), TEMPLATE,
            "<|system|>s<|user|>a<|assistant|>b</s><|user|>c<|assistant|>d e</s>", ["b</s>", "d e</s>"],
        ),
        (
            conversation("a", "<think>x</think>b", "c", "<think>y</think>d"), THINKING,
            "<|user|>a\n<|assistant|>\nb</s>\n<|user|>c\n<|assistant|>\n<think>y</think>d</s>\n",
            ["b</s>", "<think>y</think>d</s>"],
        ),
        (
            conversation("a", "b", "c", "d"), THINKING,
            "<|user|>a\n<|assistant|>\nb</s>\n<|user|>c\n<|assistant|>\n<think></think>d</s>\n",
            ["b</s>", "<think></think>d</s>"],
        ),
        (conversation("a", "b"), MARKED, "<|user|>a<|assistant|>b</s>", ["b"]),
        (
            conversation("a", "b", "c"), TEMPLATE + "{{ '' }}",
            "<|user|>a<|assistant|>b</s><|user|>c", ["b</s>"],
        ),
        (
            conversation("a", "b", "c", "d"), CLOSED,
            "<|user|>\na<|system|>\n<|assistant|>\nb<|system|>\n<|user|>\nc<|system|>\n<|assistant|>\nd<|system|>\n</s>",
            ["b<|system|>", "d<|system|>\n</s>"],
        ),
        (
            conversation("a", "b", "c"), CLOSED,
            "<|user|>\na<|system|>\n<|assistant|>\nb<|system|>\n<|user|>\nc<|system|>\n</s>", ["b<|system|>"],
        ),
        (conversation("a", "a"), TEMPLATE, "<|user|>a<|assistant|>a</s>", ["a</s>"]),
    ],
)  # fmt: skip
def test_what_is_learned(example: Example, template: str | None, whole: str, parts: list[str]) -> None:
    assert learned(example, template) == (whole, parts)


@pytest.mark.parametrize(
    ("template", "said", "parts"),
    [
        *((BEHIND, said, ["CALL</s>"]) for said in ("", None)),
        (BEHIND, " ", [" CALL</s>"]),
        (BEHIND, "I look.", ["I look.CALL</s>"]),
        *((LINES, said, ["CALL</s>"]) for said in ("", None)),
        (LINES, "I look.", ["I look.\nCALL</s>"]),
        *((INSTEAD, said, ["CALL</s>"]) for said in ("", None, "I look.")),
        *((NEVER, said, []) for said in ("", None, " ")),
        *((CALLS_MARKED, said, ["CALL</s>"]) for said in ("", None)),
        (NEVER, "I look.", ["I look.</s>"]),
    ],
)
def test_calls_of_tools_are_learned(template: str, said: str | None, parts: list[str], tmp_path: Path) -> None:
    """With text or without, by each way in which templates write them."""
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}]
    messages = [
        {"role": "user", "content": "Bonn?"},
        {"role": "assistant", "content": said, "tool_calls": calls},
        {"role": "tool", "content": "12 C"},
        {"role": "assistant", "content": "It is 12 C."},
    ]
    whole, alone = read_examples(
        lines(tmp_path / "calls.jsonl", [{"messages": messages}, {"messages": messages[:2]}]), "jsonl"
    )
    parts = [part.replace("CALL", 'weather({"city": "Bonn"})') for part in parts]
    assert learned(whole, template)[1] == [*parts, "It is 12 C.</s>"]
    if parts:
        assert learned(alone, template)[1] == parts


def test_a_message_without_text_calls_tools(tmp_path: Path) -> None:
    for message in ({"role": "assistant", "content": None}, {"role": "assistant", "tool_calls": []}):
        with pytest.raises(UserError, match="message 1 must be an object with texts role and content"):
            read_examples(lines(tmp_path / "none.jsonl", [{"messages": [message]}]), "jsonl")


INDENTED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content + '\n' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("processor", ["byte level", "sequence", "roberta"])
def test_blank_tokens_are_learned_whether_or_not_offsets_are_trimmed(processor: str) -> None:
    """Tokens of several blanks at the borders of what is learned, within it, and outside of it."""
    from tokenizers import AddedToken, processors

    def made(trim: bool) -> Any:
        own = tokenizer(INDENTED)
        own.add_tokens([AddedToken(blank, normalized=False) for blank in ("\n\n", "    ", ";\n")])
        level = processors.ByteLevel(trim_offsets=trim)
        begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        own.backend_tokenizer.post_processor = {
            "byte level": level,
            "sequence": processors.Sequence([level, begin]),
            "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=trim),
        }[processor]
        return own

    code = "if x:\n    y = 1;\n    z = 2\n\n"
    examples = [
        PlainText("", code), Completion("", "code:", "\n" + code), Completion("", "code:\n", code),
        Completion("", "x;", "\n"), Completion("", "  ", "  y "), conversation("a;", "b", "c", "    d"),
    ]  # fmt: skip
    for example in examples:
        found = []
        for trim in (False, True):
            own = made(trim)
            kept = own.backend_tokenizer.to_str()
            (one,) = Encoder(own, max_length=200, vocab_size=len(own)).encode([example]).examples
            assert own.backend_tokenizer.to_str() == kept
            found.append((one.ids.tolist(), one.labels.tolist()))
        assert found[0] == found[1], example
    (one,) = Encoder(own, max_length=200, vocab_size=len(own)).encode(examples[:1]).examples
    assert one.labels[1:].tolist() == one.ids[1:].tolist()  # all but the first, which is predicted by none


def test_long_examples() -> None:
    own = tokenizer()
    encoder = Encoder(own, max_length=6, vocab_size=len(own))
    found = encoder.encode([PlainText("", "abcdefghij"), Completion("", "abcdefgh", "i"), conversation("a", "bcdefg")])
    assert [own.decode(one.ids) for one in found.examples] == ["abcdef", "ghij</s>", "<|user|>a<|assistant|>bcd"]
    assert (found.cut, found.empty) == (2, 1)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2, column 2: the line must be JSON"),
        ("[1]", "line 2: the line must be an object such as"),
        ('{"txt": "a"}', "keys of one kind.*got the keys txt"),
        ('{"text": "a", "messages": []}', "keys of one kind"),
        ('{"completion": "a"}', "keys of one kind"),
        ('{"prompt": "a"}', "keys of one kind"),
        ('{"text": 3}', "line 2: text must be text: got int"),
        ('{"prompt": ["a"], "completion": "b"}', "prompt must be text: got list"),
        ('{"prompt": "a", "completion": " "}', "completion must not be empty"),
        ('{"messages": []}', "messages must be a list of at least one"),
        ('{"messages": [{"role": "user"}]}', "message 1 must be an object with texts role and content"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must have one of the role assistant"),
    ],
)
def test_bad_lines_are_named(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "examples.jsonl"
    file.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=said) as raised:
        read_examples(str(file), "jsonl")
    assert f"{file}, line 2" in str(raised.value)


def test_files_of_examples(tmp_path: Path) -> None:
    name = lines(tmp_path / "mixed.jsonl", [*MIXED, {"text": "x", "id": 7}])
    found = read_examples(name, "jsonl")
    kinds = {"messages": Conversation, "text": PlainText, "completion": Completion}
    expected = [kinds[next(name for name in kinds if name in row)] for row in [*MIXED, {"text": "x"}]]
    assert [type(example) for example in found] == expected
    assert found[-1] == PlainText(f"{name}, line 9", "x")
    other = lines(tmp_path / "other.jsonl", MIXED)
    assert fingerprint(read_examples(other, "jsonl")) == fingerprint(found[:-1]) != fingerprint(found)
    (tmp_path / "plain.txt").write_text("one\n\n two\n")
    assert [e.text for e in read_examples(str(tmp_path / "plain.txt"), "text") if isinstance(e, PlainText)] == [
        "one",
        " two",
    ]
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match="at least one example"):
        read_examples(str(tmp_path / "empty.jsonl"), "jsonl")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "messages need a chat template, and the tokenizer of the model has none"),
        ("{{ raise_exception('roles must alternate') }}", "chat template of the model refuses.*roles must alternate"),
        ("{{ raise_exception('no') }}{% generation %}{% endgeneration %}", "refuses the messages: no"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "writes message 2 so that it cannot be found"),
    ],
)
def test_templates_that_do_not_do(template: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        learned(conversation("a", "b"), template)
    assert str(raised.value).startswith("chats, line 1: ")


@pytest.mark.parametrize("place", ["{body}", "{{%- macro head() %}}{body}{{% endmacro %}}{{{{ '\n ' + head() }}}}"])
@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_a_template_is_told_one_date(template: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says in between."""
    form = "\n " + place.format(body="{{ strftime_now('%d %B %Y, %H:%M %%d') }}")
    own = tokenizer(form + template)
    told = Encoder(own, max_length=200, vocab_size=len(own), date=datetime.date(2026, 7, 31))
    today = Encoder(own, max_length=200, vocab_size=len(own))
    now = datetime.datetime.now()
    texts = []
    for days in (0, 1):
        clock = SimpleNamespace(now=lambda days=days: now + datetime.timedelta(days))
        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", clock)
        for encoder in (told, today):
            (one,) = encoder.encode([conversation("a", "b")]).examples
            texts.append(own.decode(one.ids))
    assert texts[:2] == texts[2:]
    assert texts[0].startswith("\n 31 July 2026, 00:00 %d<|user|>")
    assert texts[1].startswith(f"\n {now:%d %B %Y}, 00:00 %d<|user|>")


def test_tokenizers_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"with config\.json and safetensors: there is nothing"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(UserError, match=r"must have a tokenizer, .*: it has none of tokenizer\.json"):
        load_tokenizer(tmp_path)
    own = tokenizer()
    with pytest.raises(UserError, match=r"line 3: the tokenizer writes the token \d+ .* and the model has 10 rows"):
        Encoder(own, max_length=9, vocab_size=10).encode([PlainText("line 3", "abc")])
