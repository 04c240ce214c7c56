"""The assistant's tokens in the published chat templates of ten families, against what they are by hand."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lightning_peft import SupervisedFineTuning
from lightning_peft.tasks.chat import Chat, template_text

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
TEXTS = ["The quick brown fox says hello to user and assistant, system: weather in Paris is 20 degrees."] * 3

# template: beginning, end of text, end of turn, the other tokens, and what the assistant writes for a content
FAMILIES = {
    "llama_3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "llama_3_1": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen_2_5": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>", "<tool_call>", "</tool_call>"]),
    "qwen_3": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>"]),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]),
    "gemma_2": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "gemma_3": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "phi_3": ("<s>", "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "phi_4": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<|im_sep|>"]),
    "phi_4_first": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<|im_sep|>"]),
    "chatml": (None, "<|im_end|>", ["<|im_start|>"]),
    "zephyr": ("<s>", "</s>", []),
}
ENDS = {"llama": "<|eot_id|>", "qwen": "<|im_end|>", "mistral": "</s>", "gemma": "<end_of_turn>", "phi_3": "<|end|>"}
ENDS |= {"phi_4": "<|im_end|>", "chatml": "<|im_end|>", "zephyr": "</s>"}
TRIMS = ("llama", "mistral", "gemma")
WITHOUT_SYSTEM = ("gemma_2",)
WITH_TOOLS = ("llama_3_1", "qwen_2_5", "qwen_3", "mistral")
SENTENCEPIECE = ("mistral", "gemma_2", "gemma_3", "phi_3", "zephyr")


@cache
def tokenizer_of(name):
    """A small one of the family's kind: bytes, or SentencePiece with its mark before words."""
    start, end, others = FAMILIES[name]
    names = list(dict.fromkeys(t for t in (start, end, *others) if t))
    swallows = name == "phi_3"  # the published tokens take the space behind them with them
    special = [AddedToken(t, special=True, normalized=False, rstrip=swallows and t.startswith("<|")) for t in names]
    if name in SENTENCEPIECE:
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<0x00>"))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    if name in SENTENCEPIECE:  # bytes are no added tokens
        learnt = json.loads(made.to_str())["model"]
        vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {t: 256 + i for t, i in learnt["vocab"].items()}
        merges = [tuple(m) for m in learnt["merges"]]
        made.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<0x00>")
    made.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=start, eos_token=end)
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return tokenizer


def end_of(name):
    return next(end for family, end in ENDS.items() if name.startswith(family))


def said_by(name, content, *, last=True):
    """What the model has to write for a content, by hand."""
    if name.startswith(TRIMS):
        content = content.strip()
    before = {"mistral": " ", "qwen_3": "<think>\n\n</think>\n\n" if last else ""}.get(name, "")
    if name == "qwen_3" and last:
        content = content.lstrip("\n")
    return before + content + end_of(name)


def turns(*contents, system=None):
    """User and assistant in turn."""
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def encoded(name, messages, max_length=4096, **more):
    rows = [{"messages": messages, **more}]
    return SupervisedFineTuning().encode(rows, tokenizer_of(name), max_length, training=True)[0]


def learnt(name, row):
    """The supervised runs as the characters of the rendering that their tokens come from."""
    ids, labels = row["input_ids"], row["labels"]
    assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
    runs = itertools.groupby(range(len(ids)), key=lambda i: labels[i] != -100)
    return [[ids[i] for i in run] for supervised, run in runs if supervised]


def rendered(name, messages, **options):
    return tokenizer_of(name).apply_chat_template(messages, tokenize=False, **options)


def spans_of(name, messages, tools=None):
    return Chat(tokenizer_of(name), tokenizer_of(name).chat_template).with_answers(messages, tools)


CONTENTS = {
    "short": ("hello", "hi"),
    "several turns": ("one", "first answer", "two", "second answer", "three", "third answer"),
    "the same again": ("hello", "hello", "hello", "hello", "hello", "hello"),
    "unicode": ("Grüß Gott, 你好 🦊", "ça va? 你好 🦊 é", "und?", "naïve 👩‍👩‍👧 text"),
    "spaces around": ("  hello \n", "  leading and trailing  ", "more", "\n\nnew lines\n\n"),
    "a user last": ("hello", "hi", "and now?"),
}


@pytest.mark.filterwarnings("ignore:.*leaves the system prompt out")  # Mistral's, see the test of it
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("contents", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("name", FAMILIES)
def test_what_counts_is_what_the_assistant_writes_and_one_token_that_ends_its_turn(name, contents, system):
    if system and name in WITHOUT_SYSTEM:
        pytest.skip("the template refuses a system turn, which another test expects")
    messages = turns(*contents, system=system)
    said = contents[1::2]
    text, spans = spans_of(name, messages)
    last_asked = len(contents) % 2 == 0  # Qwen 3 opens a thought where no question follows
    wanted = [said_by(name, c, last=last_asked and i == len(said) - 1) for i, c in enumerate(said)]
    assert [text[a:b] for a, b in spans] == wanted
    assert text == rendered(name, messages)
    tokenizer, row = tokenizer_of(name), encoded(name, messages)
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(end_of(name))
    runs = learnt(name, row)
    assert [run.count(end) for run in runs] == [1] * len(said)
    assert all(run[-1] == end for run in runs)
    if tokenizer.bos_token_id is not None and name not in ("phi_3", "phi_4", "phi_4_first", "zephyr"):
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1
        assert row["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_begins_where_the_template_stops_when_it_asks_for_it(name):
    messages = turns("one", "first answer", "two", "second answer")
    text, spans = spans_of(name, messages)
    asked = rendered(name, messages[:3], add_generation_prompt=True)
    assert text[: spans[1][0]] == asked
    row = SupervisedFineTuning().encode([{"messages": messages}], tokenizer_of(name), 4096, training=False)[0]
    ids = tokenizer_of(name)(asked, add_special_tokens=False)["input_ids"]
    assert row["input_ids"] == ids
    assert encoded(name, messages)["input_ids"][: len(ids)] == ids


# the same template with marks set by hand around the assistant's text and the end of its turn
MARKED = {
    "llama_3_1": [
        (
            "'<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}",
            "'<|end_header_id|>\\n\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
            "{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
            "{% else %}{{- message['content'] | trim + '<|eot_id|>' }}{% endif %}",
        ),
        (
            """{{- '{"name": "' + tool_call.name + '", ' }}""",
            """{% generation %}{{- '{"name": "' + tool_call.name + '", ' }}""",
        ),
        ("""{{- "}" }}\n""", """{{- "}" }}{% endgeneration %}\n"""),
        (
            """{%- else %}\n            {{- "<|eot_id|>" }}""",
            """{%- else %}\n            {% generation %}{{- "<|eot_id|>" }}{% endgeneration %}""",
        ),
    ],
    "qwen_3": [
        (
            "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') "
            "+ '\\n</think>\\n\\n' + content.lstrip('\\n') }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{% set body = '<think>\\n' + reasoning_content.strip('\\n') "
            "+ '\\n</think>\\n\\n' + content.lstrip('\\n') %}",
        ),
        (
            "{{- '<|im_start|>' + message.role + '\\n' + content }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{% set body = content %}",
        ),
        (
            "        {%- if message.tool_calls %}\n",
            "        {%- generation %}{{- body }}{%- if message.tool_calls %}\n",
        ),
        (
            "        {{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"",
            "        {{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n    {%- elif message.role == \"tool\"",
        ),
        (
            "{%- if loop.index0 > ns.last_query_index %}",
            "{%- set body = '' %}{%- if loop.index0 > ns.last_query_index %}",
        ),
    ],
    "mistral": [
        (
            '{{- " " + message["content"]|trim + eos_token}}',
            '{% generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}',
        ),
        ('{{- "[TOOL_CALLS] [" }}', '{% generation %}{{- "[TOOL_CALLS] [" }}'),
        (
            '    {%- elif message["role"] == "assistant" %}',
            '    {% endgeneration %}{%- elif message["role"] == "assistant" %}',
        ),
    ],
    "chatml": [
        (
            "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
            "message['role'] + '\n'}}{% if message['role'] == 'assistant' %}{% generation %}"
            "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
            "{% else %}{{ message['content'] + '<|im_end|>' + '\n'}}{% endif %}",
        ),
    ],
    "phi_4": [
        (
            "assistant<|im_sep|>' + message['content'] + '<|im_end|>'}}",
            "assistant<|im_sep|>'}}{% generation %}{{ message['content'] + '<|im_end|>'}}{% endgeneration %}",
        ),
    ],
    "gemma_3": [
        (
            "{%- if message['content'] is string -%}",
            "{%- if message['content'] is string and role == 'model' -%}{% generation %}"
            "{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}"
            "{%- elif message['content'] is string -%}",
        ),
        ("    {{ '<end_of_turn>\n' }}", "    {{ '\n' if role == 'model' else '<end_of_turn>\n' }}"),
    ],
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You are welcome."},
]
THINKING = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\nfirst"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "<think>\nsecond thought\n</think>\n\nsecond"},
]


def _cases():
    for name in MARKED:
        for label, contents in CONTENTS.items():
            yield pytest.param(name, turns(*contents), None, id=f"{name}-{label}")
        if name in WITH_TOOLS:
            yield pytest.param(name, CALLING, TOOLS, id=f"{name}-tools")
            yield pytest.param(name, CALLING[:4], TOOLS, id=f"{name}-tools-last")
    yield pytest.param("qwen_3", THINKING, None, id="qwen_3-thinking")


@pytest.mark.parametrize(("name", "messages", "tools"), list(_cases()))
def test_the_same_counts_as_where_the_template_is_marked_by_hand(name, messages, tools):
    tokenizer, marked = tokenizer_of(name), (FOLDER / f"{name}.jinja").read_text()
    for old, new in MARKED[name]:
        assert old in marked
        marked = marked.replace(old, new)
    plain = encoded(name, messages, tools=tools)
    reference = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert plain["input_ids"] == reference["input_ids"]
    assert [int(label != -100) for label in plain["labels"]] == reference["assistant_masks"]
    ours = SupervisedFineTuning(chat_template=marked)
    assert ours.encode([{"messages": messages, "tools": tools}], tokenizer, 4096, training=True) == [plain]


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_of_tools_are_learnt_and_their_results_are_not(name):
    text, spans = spans_of(name, CALLING, TOOLS)
    said = [text[a:b] for a, b in spans]
    assert len(said) == 3
    assert '"weather"' in said[0]
    assert "Zürich" in said[0]
    assert said[0].endswith(end_of(name))
    assert "sunny" not in said[0]
    assert "It is sunny." in said[1]
    assert [s.count(end_of(name)) for s in said] == [1, 1, 1]


def test_thoughts_stay_and_go_as_the_template_says():
    text, spans = spans_of("qwen_3", THINKING)
    assert [text[a:b] for a, b in spans] == [
        "first<|im_end|>",
        "<think>\nsecond thought\n</think>\n\nsecond<|im_end|>",
    ]
    apart = [*THINKING[:3], {"role": "assistant", "reasoning_content": "second thought", "content": "second"}]
    assert spans_of("qwen_3", apart)[0] == text
    # between calls of tools they stay, until another question follows
    thinking_call = {"role": "assistant", "content": "<think>\nlook\n</think>\n\n", "tool_calls": [CALL]}
    looped = [CALLING[0], thinking_call, *CALLING[2:4]]
    text, spans = spans_of("qwen_3", looped, TOOLS)
    assert text[slice(*spans[0])].startswith("<think>\nlook\n</think>\n\n")
    text, spans = spans_of("qwen_3", [*looped, *CALLING[4:]], TOOLS)
    assert text[slice(*spans[0])].startswith("<tool_call>")
    assert text[slice(*spans[1])] == "It is sunny.<|im_end|>"


@pytest.mark.parametrize("name", ["chatml", "zephyr", "alpaca"])
def test_the_shipped_templates_begin_once_and_end_each_answer_once(name):
    tokenizer = tokenizer_of("chatml" if name == "chatml" else "zephyr")
    chat = Chat(tokenizer, template_text(name))
    text, spans = chat.with_answers(turns("one", "first", "two", "second", system="Be brief."))
    assert [text[a:b] for a, b in spans] == [f"{s}{tokenizer.eos_token}" for s in ("first", "second")]
    assert not tokenizer.bos_token or text.count(tokenizer.bos_token) == 1


def test_what_a_prompt_of_messages_says_itself_is_not_learnt():
    prompt, completion = turns("one", "first", "two"), [{"role": "assistant", "content": "second"}]
    for template in (None, _marked("chatml")):
        task = SupervisedFineTuning(chat_template=template)
        tokenizer = tokenizer_of("chatml")
        (row,) = task.encode([{"prompt": prompt, "completion": completion}], tokenizer, 99, training=True)
        assert [tokenizer.decode(run) for run in learnt("chatml", row)] == ["second<|im_end|>"]
        (asked,) = task.encode([{"prompt": prompt}], tokenizer, 99, training=False)
        assert tokenizer.decode(asked["input_ids"]).endswith("two<|im_end|>\n<|im_start|>assistant\n")


def _marked(name):
    text = (FOLDER / f"{name}.jinja").read_text()
    for old, new in MARKED[name]:
        text = text.replace(old, new)
    return text


def test_a_thought_that_the_prompt_opens_is_no_part_of_the_header():
    opening = (FOLDER / "chatml.jinja").read_text().replace("assistant\n' }}", "assistant\n<think>\n' }}")
    chat = Chat(tokenizer_of("chatml"), opening)
    text, spans = chat.with_answers(turns("one", "<thing>", "two", "second"))
    assert [text[a:b] for a, b in spans] == ["<thing><|im_end|>", "second<|im_end|>"]


SPACED = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
SPACED += "{% if add_generation_prompt %}assistant: {% endif %}"
SAID = "{{ m.content }}<|im_end|>"
MARKS = "{% if m.role == 'assistant' %}{% generation %}" + SAID + "{% endgeneration %}{% else %}" + SAID + "{% endif %}"


@pytest.mark.parametrize("template", [SPACED, SPACED.replace(SAID, MARKS)], ids=["unmarked", "marked"])
def test_an_answer_behind_a_space_is_learnt_from_its_first_token_as_it_is_asked_for(template):
    tokenizer = tokenizer_of("chatml")
    assert len(tokenizer(" hello")["input_ids"]) == 1  # which swallows the space
    chat = Chat(tokenizer, template)
    messages = turns("one", "hello", "two", "hello")
    ids, labels = chat.encode(messages)
    runs = learnt("chatml", {"input_ids": ids, "labels": labels})
    assert [tokenizer.decode(run) for run in runs] == ["hello<|im_end|>"] * 2
    asked = chat.encode_prompt(messages[:1])
    assert ids[: len(asked)] == asked
    assert tokenizer.decode(ids) == chat.text(messages)


def test_an_answer_whose_space_a_tokenizer_cannot_leave_to_the_prompt_is_refused():
    template = SPACED.replace("<|im_end|>", "</s>")
    with pytest.raises(ValueError, match=r"first token begins before it, within '.*assistant: ': .* write the space"):
        Chat(tokenizer_of("zephyr"), template).encode(turns("one", "says"))


def test_a_long_conversation_loses_its_end_and_one_without_an_answer_is_refused():
    long = turns("one", "first", "two " * 40, "second")
    row = encoded("chatml", long, 40)
    assert len(row["input_ids"]) == 40
    assert [tokenizer_of("chatml").decode(run) for run in learnt("chatml", row)] == ["first<|im_end|>"]
    with pytest.raises(ValueError, match=r"no supervised token among its first 40 of \d+: .* data\.max_length"):
        encoded("chatml", turns("two " * 40, "second"), 40)


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        (
            "chatml",
            [{"role": "user", "content": "a"}, {"role": "assitant", "content": "b"}],
            "did you mean 'assistant'",
        ),
        (
            "chatml",
            [{"role": "developer", "content": "a"}, *turns("a", "b")],
            "'developer' in message 1 .*mean 'system'",
        ),
        ("chatml", [{"role": "user", "content": "a"}], "no turn of an assistant to learn from, only of user"),
        ("chatml", turns("a", " "), "empty content of role 'assistant' in message 2"),
        ("chatml", [{"content": "a"}], "no 'role' in message 1"),
        ("chatml", [], "empty list in 'messages'"),
        ("chatml", "not json", "no JSON in 'messages'"),
        ("chatml", {"role": "user"}, "a dict in 'messages'; expected a list"),
        ("chatml", [*turns("a"), {"role": "assistant", "content": 3}], "an int as content in message 2"),
        ("chatml", CALLING, "left out by the chat template"),
        (
            "zephyr",
            [*turns("a"), {"role": "tool", "content": "b"}, *turns("a", "c")[1:]],
            "message 2 .role 'tool'. left",
        ),
        ("gemma_2", turns("a", "b", system="c"), "refused by the chat template: System role not supported"),
        ("mistral", [*turns("a"), *turns("a", "b")], "refused by the chat template: After the optional system"),
        ("llama_3_1", [*turns("a"), {**CALLING[1], "tool_calls": [CALL, CALL]}], "only supports single tool-calls"),
    ],
)
def test_what_is_no_conversation_is_refused_in_a_sentence(name, messages, said):
    with pytest.raises(ValueError, match=said):
        encoded(name, messages)


def test_a_system_prompt_that_the_template_leaves_out_is_said():
    with pytest.warns(UserWarning, match="leaves the system prompt out"):
        text, _ = spans_of("mistral", turns("a", "b", system="Be brief."))
    assert "Be brief." not in text
    text, _ = spans_of("mistral", turns("a", "b", "c", system="Be brief."))
    assert "Be brief." in text


def test_tools_that_the_template_does_not_write_are_refused():
    with pytest.raises(ValueError, match="has tools, which the chat template leaves out"):
        encoded("chatml", turns("a", "b"), tools=TOOLS)


def test_a_template_whose_end_is_no_token_is_refused():
    with pytest.raises(RuntimeError, match=r"writes '<\|im_end\|>\\n' behind an answer, which is no single token"):
        Chat(tokenizer_of("zephyr"), template_text("chatml"))


def test_a_template_that_is_no_jinja_is_one_error_and_not_one_for_each_row():
    broken = "{% for m in messages %}{{ m.content }}"
    with pytest.raises(RuntimeError, match=r"the chat template is no Jinja: .*endfor.* \(its line 1\)"):
        SupervisedFineTuning(chat_template=broken).encode(
            [{"messages": turns("a", "b")}] * 2, tokenizer_of("chatml"), 99, training=True
        )


def test_a_template_is_named_or_a_file_or_jinja(tmp_path):
    (tmp_path / "my.jinja").write_text("{{ messages }}")
    assert template_text(str(tmp_path / "my.jinja")) == "{{ messages }}"
    assert template_text("{{ messages }}") == "{{ messages }}"
    assert SupervisedFineTuning("zephyr").to_config()["chat_template"] == template_text("zephyr")
    with pytest.raises(ValueError, match=r"'chatlm' is unknown; did you mean 'chatml'"):
        SupervisedFineTuning("chatlm")
    with pytest.raises(FileNotFoundError, match=r"no file .*your\.jinja"):
        SupervisedFineTuning(str(tmp_path / "your.jinja"))


def test_conversations_need_a_tokenizer_that_tells_places():
    class Slow:
        is_fast = False

    with pytest.raises(RuntimeError, match="conversations need a fast tokenizer, but this is a Slow"):
        Chat(Slow(), template_text("zephyr"))
