"""Chat templates: the prompt sampled from is the prompt trained on, nothing of a row is lost, and it ends once.

Real templates are those that the trl wheel ships (slow); a few of our own stand for their kinds in the default set.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spin_reg import models, render, sources, templates
from spin_reg.errors import ConfigError
from spin_reg.render import Messages, Unusable
from spin_reg.settings import Pretrained

CONTROL = re.compile(r"<\|[A-Za-z0-9_▁]+\|?>|<[a-z_]+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_[a-z]+>|\[gMASK\]|<sop>")
LINES = [f"{i} and {i * i}: how many\n\nmust there be?\n The answer is the\n{i % 7}th one. \n" for i in range(300)]


@cache
def trained(across: bool) -> str:
    """A small BPE; `across`: its merges cross blanks, newlines and words, so that they cross a template's borders."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not across)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(LINES, trainer)
    return str(core.to_str())


def tokenizer(
    template: str, bos: str | None, eos: str, *, across: bool = False, pad: str | None = None
) -> PreTrainedTokenizerBase:
    """A tokenizer whose special tokens are those that the template mentions; it would add a BOS of its own if asked."""
    core = Tokenizer.from_str(trained(across))
    special = sorted({*CONTROL.findall(template), eos, *([bos] if bos else [])})
    core.add_special_tokens(special)
    if bos:
        ids = [(bos, core.token_to_id(bos))]
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad or eos)
    made.chat_template = template
    return made


def chat(*texts: str, system: str | None = None) -> Messages:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def ends_of(tok: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return models.end_ids(None, tok)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
DROPS_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
THINKS = CHATML.replace("assistant\n{%", "assistant\n<think>\n{%")  # the prompt alone opens <think>
EMPTY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def chatml(template: str = CHATML, **kwargs: Any) -> PreTrainedTokenizerBase:
    return tokenizer(template, None, "<|endoftext|>", **kwargs)


def test_a_template_ends_an_answer_with_its_own_token_whatever_the_eos() -> None:
    """The tokenizer's eos (which is its pad, too) is <|endoftext|>, and no generation config names <|im_end|>."""
    tok = chatml()
    turn, eos = tok.convert_tokens_to_ids("<|im_end|>"), tok.eos_token_id
    assert ends_of(tok) == tuple(sorted((turn, eos)))
    prompt, real = render.render(tok, chat("2 + 2?", "4"), ends_of(tok))
    assert tok.decode(prompt + real) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"


@pytest.mark.parametrize(
    ("behind", "end"),
    [
        ("<|a|>", "<|a|>"),
        ("\n<|a|>\n<|endoftext|>", "<|a|>"),  # the text is closed behind the turn
        ("<|a|><|endoftext|>", "<|endoftext|>"),  # both at once: the one that is known to end answers
        (" and on", None),
        ("", None),
    ],
)
def test_of_what_stands_behind_an_answer_the_end_is(behind: str, end: str | None) -> None:
    template = "{% for m in messages %}<|r|>{{ m.content }}" + behind + "{% endfor %}<|a|>"
    tok = chatml(template.replace("<|a|>", "") if end is None else template.removesuffix("<|a|>"))
    found = render.end_of_turn(tok, {tok.eos_token_id})
    assert (None if found is None else tok.convert_ids_to_tokens(found)) == end


def test_an_answer_that_the_template_does_not_end_gets_the_eos() -> None:
    tok = chatml("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    prompt, real = render.render(tok, chat("2 + 2?", "4"), ends_of(tok))
    assert tok.decode(prompt + real) == "user: 2 + 2?\nassistant: 4\n<|endoftext|>"


def refusal(tok: PreTrainedTokenizerBase, messages: Messages) -> str:
    with pytest.raises(Unusable) as raised:
        render.render(tok, messages, ends_of(tok))
    return str(raised.value)


def test_a_system_message_never_vanishes() -> None:
    said = chat("2 + 2?", "4", system="Be brief.")
    assert "System role not supported" in refusal(chatml(NO_SYSTEM), said)
    assert "message 1 (system); dataset.fold_system" in refusal(chatml(DROPS_SYSTEM), said)
    for template in (NO_SYSTEM, DROPS_SYSTEM):
        tok = chatml(template)
        prompt, _ = render.render(tok, render.fold_system(said), ends_of(tok))
        assert "user\nBe brief.\n\n2 + 2?<|im_end|>" in tok.decode(prompt)


def test_folding_keeps_every_text_in_order() -> None:
    said = chat("a", "b", "c", "d", system="s")
    later = [*said[:3], {"role": "system", "content": "t"}, *said[3:]]
    assert render.fold_system(later) == chat("s\n\na", "b", "t\n\nc", "d")
    assert render.fold_system(said[1:]) == said[1:] and said[0]["content"] == "s"
    with pytest.raises(Unusable, match="no user message follows"):
        render.fold_system([*said[:2], {"role": "system", "content": "t"}, said[2]])


@pytest.mark.parametrize(
    ("change", "number"),
    [("m.content.replace('secret', '')", "2 (user)"), ("m.content[:3]", "1 (system)"), ("m.content | upper", "1 (sys")],
)
def test_a_template_that_drops_or_rewrites_a_text_is_refused(change: str, number: str) -> None:
    said = chat("the secret", "b", "c", "d", system="Be brief.")
    assert f"drops or rewrites, message {number}" in refusal(chatml(CHATML.replace("m.content", change)), said)


def test_a_template_that_moves_the_system_message_to_the_newest_question_is_refused() -> None:
    """In the prompt it stands there; in the whole conversation, which ends with an answer, nowhere."""
    mark = "{% if loop.last and m.role == 'user' %}{{ messages[0].content }}{% endif %}{{ m.content"
    tok = chatml(DROPS_SYSTEM.replace("{{ m.content", mark))
    assert "not a prefix" in refusal(tok, chat("a", "b", system="Be brief."))


def test_thinking_may_go_from_earlier_answers_but_not_from_the_real_one() -> None:
    keeps_last = CHATML.replace(
        "m.content", "(m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1])"
    )
    said = chat("a?", "<think>\nhm\n</think>\n\nb", "c?", "<think>\nso\n</think>\n\nd")
    tok = chatml(keeps_last)
    prompt, real = render.render(tok, said, ends_of(tok))
    assert "hm" not in tok.decode(prompt) and "so" in tok.decode(real)
    drops = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    assert "message 4 (assistant)" in refusal(chatml(drops), said)
    assert "message 3 (user)" in refusal(chatml(drops), [*said[:2], {"role": "user", "content": "x</think>y"}, said[3]])
    assert "empty" in refusal(tok, chat("a?", "<think>\nhm\n</think>\n"))


def test_where_the_prompt_alone_opens_a_thought_the_row_is_refused_and_says_what_to_do() -> None:
    why = refusal(chatml(THINKS), chat("2 + 2?", "4"))
    assert "not a prefix" in why and "model.template_kwargs" in why and "model.chat_template" in why


def test_an_empty_thought_is_part_of_the_answer_unless_the_prompt_has_it() -> None:
    said = chat("2 + 2?", "4")
    for kwargs, expected in (({}, "<think>\n\n</think>\n\n4<|im_end|>"), ({"enable_thinking": False}, "4<|im_end|>")):
        tok = chatml(templates.given(EMPTY_THOUGHT, kwargs))
        prompt, real = render.render(tok, said, ends_of(tok))
        assert tok.decode(real) == expected
        assert tok.decode(prompt).endswith("assistant\n" + "<think>\n\n</think>\n\n" * bool(kwargs))


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("mark", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_the_text_of_a_control_token_is_no_text(place: int, mark: str) -> None:
    said = chat("a", "b", system="s")
    said[place] = said[place] | {"content": f"see {mark}here"}
    why = refusal(chatml(), said)
    assert why.startswith("has the text of a control token,")  # what is before the comma is what is counted
    assert mark in why and f"message {place + 1} ({said[place]['role']})" in why


def test_one_bos_and_only_where_the_template_has_it() -> None:
    """Whatever the tokenizer itself would add in front."""
    for template, count in (("{{ bos_token }}" + CHATML, 1), (CHATML, 0)):
        tok = tokenizer(template, "<|bos|>", "<|endoftext|>")
        assert tok("x")["input_ids"][0] == tok.bos_token_id
        prompt, real = render.render(tok, chat("a", "b"), ends_of(tok))
        assert (prompt + real).count(tok.bos_token_id) == count == prompt[:1].count(tok.bos_token_id)
    tok = tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML, "<|bos|>", "<|endoftext|>")
    assert "two BOS" in refusal(tok, chat("a", "b"))


def test_an_answer_that_merges_with_the_prompts_end_is_refused() -> None:
    """Its tokens are other ones than those that could be sampled after the prompt."""
    tok = chatml(CHATML.replace(" | trim", ""), across=True)
    one = next(text for text in map(tok.decode, range(len(tok))) if text[0] == "\n" and text[1:].strip())
    assert "become one token" in refusal(tok, chat("a", one[1:] + "!"))
    _, real = render.render(tok, chat("a", "!" + one[1:]), ends_of(tok))
    assert tok.decode(real) == "!" + one[1:] + "<|im_end|>"


def test_an_end_that_is_an_ordinary_token_is_found_too() -> None:
    tok = chatml()
    dot = tok.convert_tokens_to_ids(".")
    with pytest.raises(Unusable, match="ends an answer"):
        render.render(tok, chat("a", "b. c"), (*ends_of(tok), dot))


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.booleans(), st.none(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()))
def test_a_default_reaches_the_template_as_it_was_given(value: Any) -> None:
    """It adds nothing to the text, and gives way to what is passed by name."""
    body = "  \n{% if x is string %}{{ x }}{% elif x is none %}nothing{% else %}{{ x | string }}{% endif %}"
    tok = chatml(templates.given(body, {"x": value}))
    shown = {None: "nothing"}.get(value, str(value))
    plain = tok.apply_chat_template(chat("a"), tokenize=False, chat_template=body, x=value)
    assert tok.apply_chat_template(chat("a"), tokenize=False) == plain == f"  \n{shown}"
    assert tok.apply_chat_template(chat("a"), tokenize=False, x="else") == "  \nelse"


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"add_generation_prompt": True}, "renderer sets this itself"),
        ({"tokenize": False}, "renderer sets this itself"),
        ({"eos_token": "x"}, "renderer sets this itself"),
        ({"a b": 1}, "no name"),
        ({"x": [1]}, "it is a list"),
        ({"x": float("nan")}, "it is a float"),
    ],
)
def test_what_no_template_can_be_given_is_refused(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        templates.asked(Pretrained(name_or_path="m", template_kwargs=kwargs))
    assert named in raised.value.why and next(iter(kwargs)) in raised.value.where


def test_what_a_template_does_not_ask_for_is_refused_by_name() -> None:
    with pytest.raises(ConfigError) as raised:
        templates.given(CHATML, {"enable_thinkin": False})
    assert "enable_thinkin stands nowhere" in raised.value.why


@pytest.mark.parametrize("takes_a_date", [True, False])
def test_a_template_that_writes_todays_date_must_be_pinned(takes_a_date: bool) -> None:
    """As Llama 3.2's and gpt-oss's do: the same settings would make other prompts tomorrow."""
    clock = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    template = (clock if takes_a_date else "{{ strftime_now('%d') }}") + CHATML
    with pytest.raises(ConfigError, match="today's date") as refused:
        templates.given(template, {})
    assert ("date_string: " in refused.value.todo) == takes_a_date and "model.chat_template" in refused.value.todo
    if takes_a_date:
        assert "1 May 1999" in chatml(templates.given(template, {"date_string": "1 May 1999"})).apply_chat_template(
            chat("a", "b"), tokenize=False
        )


def test_the_template_is_known_by_content_and_what_it_is_given_by_value(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    one, two = tmp_path / "one.jinja", tmp_path / "two.jinja"
    one.write_text(CHATML)
    two.write_text(CHATML)

    def identity(**kwargs: Any) -> str:
        return sources.tokenizer_sha256(Pretrained(name_or_path=str(folder), **kwargs))

    assert identity(chat_template=str(one)) == identity(chat_template=str(two)) != identity()
    assert identity(template_kwargs={"x": 1}) not in {identity(), identity(template_kwargs={"x": 2})}
    before = identity(chat_template=str(two))
    two.write_text(NO_SYSTEM)
    assert identity(chat_template=str(two)) != before


@pytest.mark.parametrize(("content", "why"), [(None, "No such file"), (b"", "empty"), (b"\xff\xfe", "utf-8")])
def test_a_template_that_cannot_be_read_exits_2_and_leaves_nothing(
    content: bytes | None, why: str, command: Command, tmp_path: Path
) -> None:
    folder, path = tmp_path / "m", tmp_path / "t.jinja"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    if content is not None:
        path.write_bytes(content)
    words = ["model=pretrained", f"model.name_or_path={folder}", f"model.chat_template={path}", "tracker=none"]
    result = command("train", *words, f"outputs={tmp_path / 'o'}")
    assert result.code == 2 and f"model.chat_template={path}" in result.err and why in result.err, result.err
    assert not (tmp_path / "o").exists()


class Family(NamedTuple):
    """How a real family's tokenizer is set up, and what must be found: the end of a turn, and a BOS or none."""

    names: str
    bos: str | None
    eos: str
    end: str | None
    begins: bool = False  # the template begins with the BOS
    given: dict[str, Any] = {}
    refused: str = ""  # why no row can be used


OFF = {"enable_thinking": False}
GEMMA, QWEN3 = ("<bos>", "<eos>"), (None, "<|endoftext|>")  # Qwen's base tokenizers: the turn's end is not their eos
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>")  # and Llama's
COHERE, DEEPSEEK = 2 * ("<|END_OF_TURN_TOKEN|>",), 2 * ("<｜end▁of▁sentence｜>",)
FAMILIES = [
    Family("cohere cohere_training cohere2 cohere2_training", "<BOS_TOKEN>", *COHERE, begins=True),
    Family("gemma gemma_training gemma3 gemma3_training", *GEMMA, "<end_of_turn>", begins=True),
    Family("gemma4 gemma4_v2 gemma4_v3 gemma4_v4 gemma4_v5", *GEMMA, "<turn|>", begins=True),
    Family("diffusion_gemma diffusion_gemma_training", *GEMMA, "<turn|>", begins=True),
    Family("glm4moe", None, "<|endoftext|>", None),
    Family("glm4moe_training", None, "<|endoftext|>", "<|user|>"),  # it ends its turn with the next one's mark
    Family("gptoss gptoss_training", "<|startoftext|>", *2 * ("<|return|>",)),
    Family("lfm2 lfm2_training lfm2_v2 lfm2_v2_training", "<|startoftext|>", *2 * ("<|im_end|>",), begins=True),
    Family("lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl", "<|startoftext|>", *2 * ("<|im_end|>",), begins=True),
    Family("llama3 llama3_training llama3_1 llama3_2", *LLAMA, "<|eot_id|>", begins=True),
    Family("muse_glimmer muse_glimmer_training", "<|bos|>", "<|eot|>", "<|eot|>", begins=True),
    Family("phi3 phi3_training phi3_5 phi3_5_training", "<s>", "<|endoftext|>", "<|end|>"),
    Family("qwen2_5 qwen2_5_training qwen2_5_vl qwen2_5_vl_training", *QWEN3, "<|im_end|>"),
    Family("qwen3 qwen3_training qwen3_instruct_2507 qwen3_vl qwen3_vl_training", *QWEN3, "<|im_end|>"),
    Family("qwen3 qwen3_training qwen3_5_nothink qwen3_5_nothink_training", *QWEN3, "<|im_end|>", given=OFF),
    Family("qwen3_5_think qwen3_6 qwen3_8 qwen3_5_think_training", *QWEN3, "<|im_end|>", given=OFF),
    Family("nemotron_3_nano nemotron_3_super nemotron_3_ultra nemotron_3_5_lightning", *QWEN3, "<|im_end|>", given=OFF),
    Family("qwen3_8", *QWEN3, "<|im_end|>", given=OFF | {"preserve_thinking": False}),
    Family(
        "deepseek_r1_distill deepseekv3 deepseekv3_training", "<｜begin▁of▁sentence｜>", *DEEPSEEK,
        begins=True, refused="not a prefix",
    ),
    Family("nemotron_3_nano nemotron_3_super nemotron_3_ultra", *QWEN3, "<|im_end|>", refused="not a prefix"),
    Family("idefics3 smolvlm", "<|im_start|>", *2 * ("<end_of_utterance>",), refused="drops or rewrites"),
]  # fmt: skip
CASES = [(family, name) for family in FAMILIES for name in family.names.split()]
real_templates = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="needs the templates that the package trl brings"),
]


def shipped(name: str) -> str:
    """A template as trl ships it, without importing trl."""
    spec = find_spec("trl")
    assert spec is not None and spec.submodule_search_locations is not None
    return (Path(next(iter(spec.submodule_search_locations))) / "chat_templates" / f"{name}.jinja").read_text()


def of_family(family: Family, name: str, across: bool) -> PreTrainedTokenizerBase:
    pinned = re.sub(r"strftime_now(\([^)]*\))?", "'1 May 1999'", shipped(name))
    text = templates.given(pinned, family.given)
    pad = None if across else "<|pad|>"  # pad is eos, and is not
    return tokenizer(text, family.bos, family.eos, across=across, pad=pad)


each_template = pytest.mark.parametrize(
    ("family", "name"), CASES, ids=[f"{name} {f.given or ''}".strip() for f, name in CASES]
)


class TestRealTemplates:
    """Over the templates of the trl wheel."""

    pytestmark = real_templates

    @each_template
    def test_the_end_of_a_turn_and_the_bos_are_the_familys(self, family: Family, name: str) -> None:
        for across in (False, True):
            tok = of_family(family, name, across)
            found = render.end_of_turn(tok, {tok.eos_token_id})
            if family.refused == "drops or rewrites":
                assert found is None
            else:
                assert (found and tok.convert_ids_to_tokens(found)) == family.end
            said = chat("How many?", "Nine.")
            if family.refused:
                assert family.refused in refusal(tok, said)
                continue
            prompt, real = render.render(tok, said, ends_of(tok))
            assert tok.convert_ids_to_tokens(real[-1]) == (family.end or family.eos)
            assert (prompt[0] == tok.bos_token_id) == family.begins

    @each_template
    def test_every_row_is_rendered_whole_or_refused(self, family: Family, name: str) -> None:
        for across in (False, True):
            assert some_taken(of_family(family, name, across)) != bool(family.refused)


words = st.one_of(
    st.sampled_from(["2 + 2?", "must there be?\n", " The answer is the\n1th one.", "\n\nhow", "Σ 日\u200d語 🙂", "a"]),
    st.text(min_size=1, max_size=30).filter(str.strip),
    st.text("ab \n\t<|>{}%", min_size=1, max_size=20).filter(str.strip),
)  # fmt: skip


@st.composite
def conversations(draw: Callable[..., Any]) -> Messages:
    texts = draw(st.lists(words, min_size=2, max_size=6).filter(lambda some: len(some) % 2 == 0))
    return chat(*texts, system=draw(st.none() | words))


def whole_or_refused(tok: PreTrainedTokenizerBase, messages: Messages) -> bool:
    """The property of a row; returns whether the template takes it."""
    ends = ends_of(tok)
    try:
        prompt, real = render.render(tok, messages, ends)
    except Unusable as fault:
        assert str(fault)
        return False
    asked = tok.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    text = tok.apply_chat_template(messages, tokenize=False)
    assert prompt == tok(asked, add_special_tokens=False)["input_ids"] == render.prompt_ids(tok, messages[:-1])
    assert sum(token in ends for token in real) == 1 and real[-1] in ends
    end = tok.convert_ids_to_tokens(real[-1])
    ids = tok(text, add_special_tokens=False)["input_ids"]
    if end in text[len(asked) :]:
        assert (prompt + real) == ids[: len(prompt) + len(real)]
        text = text[: text.index(end, len(asked)) + len(end)]
    else:
        assert (prompt + real[:-1]) == ids and end == tok.eos_token
        text += end
    assert tok.decode(prompt + real) == text
    assert all(message["content"].strip() in text for message in messages)
    if tok.bos_token_id is not None:
        assert (prompt + real).count(tok.bos_token_id) == (prompt[0] == tok.bos_token_id)
    return True


def some_taken(tok: PreTrainedTokenizerBase) -> bool:
    """The property over random conversations; whether any was taken."""
    taken = []

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(conversations())
    def holds(messages: Messages) -> None:
        taken.append(whole_or_refused(tok, messages))

    holds()
    return any(taken)


ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)


def sentencepiece(template: str, blank_in_front: bool) -> PreTrainedTokenizerBase:
    """Blanks as a mark, unknown characters and newlines as bytes: as the tokenizers of Llama 2, Mistral and Zephyr.

    `blank_in_front`: each text between special tokens gets a blank of its own in front.
    """
    core = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    mark = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark]) if blank_in_front else mark
    front = [decoders.Strip(" ", 1, 0)] if blank_in_front else []
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *front])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    core.train_from_iterator([line.replace("\n", " ") for line in LINES], trainer)
    ids = [("<s>", core.token_to_id("<s>"))]
    core = Tokenizer.from_str(core.to_str())
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    made.chat_template = template
    return made


@pytest.mark.parametrize("blank_in_front", [False, True])
@pytest.mark.parametrize(("template", "begins"), [(ZEPHYR, False), (MISTRAL, True)], ids=["zephyr", "mistral"])
def test_tokenizers_that_mark_blanks(template: str, begins: bool, blank_in_front: bool) -> None:
    """Zephyr is the base of experiment=spin: its roles are marked by plain text, turns end with the eos (and pad)."""
    tok = sentencepiece(template, blank_in_front)
    assert ends_of(tok) == (tok.eos_token_id,)
    some = (chat("How many?", "Nine."), chat("a", "b", "2 + 2?", " The answer is 4"), chat("Σ 日", "語 🙂\n\nhow"))
    for said in some:
        prompt, real = render.render(tok, said, ends_of(tok))
        whole = tok(tok.apply_chat_template(said, tokenize=False), add_special_tokens=False)["input_ids"]
        assert prompt + real == whole[: len(prompt + real)] and prompt == render.prompt_ids(tok, said[:-1])
        assert real.count(tok.eos_token_id) == 1 and real[-1] == tok.eos_token_id
        assert (prompt + real).count(tok.bos_token_id) == begins == (prompt[0] == tok.bos_token_id)
        assert said[-1]["content"].strip() in tok.decode(prompt + real)
    with_system = chat("a", "b", system="Be brief.")
    if begins:
        assert "roles must alternate; dataset.fold_system=true may help" in refusal(tok, with_system)
    assert render.render(tok, render.fold_system(with_system), ends_of(tok))


@pytest.mark.parametrize("template", [CHATML, EMPTY_THOUGHT, "{{ bos_token }}" + NO_SYSTEM])
def test_every_row_is_rendered_whole_or_refused(template: str) -> None:
    assert some_taken(tokenizer(template, "<|bos|>", "<|endoftext|>", across=True))


def test_a_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    """So an iterate renders as it was trained, with plain transformers too."""
    chatml(EMPTY_THOUGHT).save_pretrained(tmp_path / "a")
    tok = models.tokenizer_of(tmp_path / "a", False, template_kwargs=OFF)
    tok.save_pretrained(tmp_path / "b")
    again = models.tokenizer_of(tmp_path / "b", False)
    assert again.chat_template == tok.chat_template != EMPTY_THOUGHT
    assert render.render(again, chat("a", "b"), ends_of(again)) == render.render(tok, chat("a", "b"), ends_of(tok))
    json.loads((tmp_path / "b/tokenizer_config.json").read_text())
