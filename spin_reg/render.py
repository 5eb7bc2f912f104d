"""Conversations to token ids: one renderer for sampling and training alike.

The template's text is made twice a row, as the prompt (with its generation prompt) and as the whole conversation, and
each text is tokenised once, as it stands: special tokens are the template's business, none is added. What a row is made
of are these ids and no others, so the prompt sampled from is the prompt trained on, id for id.
"""

from functools import lru_cache
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerBase

from spin_reg.errors import ConfigError

Messages = list[dict[str, str]]
THOUGHT = "</think>"  # what stands before it is a reasoning model's thinking, which templates may rewrite


class Unusable(Exception):
    """Why a row cannot be used."""


def fold_system(messages: Messages) -> Messages:
    """For templates without a system role: a system message's text in front of the next user message, a line between.

    Raises:
        Unusable: no user message comes after a system message.
    """
    folded: Messages = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user":
            folded.append({"role": "user", "content": "\n\n".join([*waiting, message["content"]])})
            waiting = []
        else:
            folded.append(message)
    if waiting:
        raise Unusable("has a system message that no user message follows, so it cannot be folded into one")
    return folded


def _text(tokenizer: PreTrainedTokenizerBase, messages: Messages, **kwargs: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except (TemplateError, OverflowError, RecursionError) as error:
        if type(error) is TemplateError:  # the template's own raise_exception, about these messages
            hint = "; dataset.fold_system=true may help" if any(m["role"] == "system" for m in messages) else ""
            raise Unusable(f"is refused by the chat template: {error}{hint}") from error
        escape = "it reaches for what templates may not touch, " if isinstance(error, SecurityError) else ""
        raise ConfigError(
            "The model's chat template cannot be used.",
            where=f"model.chat_template, or the one of {tokenizer.name_or_path} where none is given",
            why=f"{escape}{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            todo="use a model with a sound chat template, or give another: model.chat_template=FILE",
        ) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The prompt with the template's generation prompt at its end: what is sampled from and trained on."""
    return _ids(tokenizer, _text(tokenizer, messages, add_generation_prompt=True))


def asked_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """`prompt_ids` of a prompt that may be anybody's: the ids that a row of data with this prompt would have.

    Raises:
        Unusable: a text holds a control token; the template refuses the prompt, or drops or rewrites a text.
    """
    _refuse_controls(tokenizer, messages, ())
    asked = _text(tokenizer, messages, add_generation_prompt=True)
    _refuse_lost_prompt([*messages, {"role": "assistant", "content": ""}], asked)
    return _ids(tokenizer, asked)


@lru_cache(maxsize=1)
def _controls(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[int, str], dict[str, list[str]]]:
    """The tokenizer's control tokens: their texts by id, and by the first two characters (which most texts lack)."""
    texts = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    by_start: dict[str, list[str]] = {}
    for text in texts.values():
        by_start.setdefault(text[:2], []).append(text)
    return texts, by_start


def end_of_turn(tokenizer: PreTrainedTokenizerBase, known: set[int]) -> int | None:
    """The control token with which the chat template ends an answer.

    Of the control tokens directly behind the last answer of a conversation the first that is `known` to end answers,
    else the first of them. None: the template puts none there, or cannot render a plain question and its answer.
    """
    answer = "answer"
    try:
        text = _text(tokenizer, [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}])
    except Unusable:
        return None
    _, found, behind = text.rpartition(answer)
    controls, _ = _controls(tokenizer)
    ids = _ids(tokenizer, behind) if found else []
    start = next((i for i, token in enumerate(ids) if token in controls), len(ids))
    end = next((i for i in range(start, len(ids)) if ids[i] not in controls), len(ids))
    return next((token for token in ids[start:end] if token in known), ids[start] if start < end else None)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """A conversation whose last message is the real answer, as (prompt ids, real answer's ids).

    The answer's ids are all that the template puts between its generation prompt and the end of the answer's turn: the
    answer's text as the template writes it, and what the template puts in front of it (Qwen 3 an empty `<think>` block,
    unless enable_thinking=false puts that into the prompt). They end with exactly one end token, after which nothing
    follows (what a template puts behind its end of turn is cut off; where it puts no end token, the tokenizer's eos is
    added).

    Raises:
        Unusable: a text holds a control token or an end token; the template refuses the conversation, or drops or
            rewrites a text; the prompt is not a prefix of the whole; or the answer is empty.
    """
    _refuse_controls(tokenizer, messages, ends)
    asked = _text(tokenizer, messages[:-1], add_generation_prompt=True)
    whole = _text(tokenizer, messages)
    if not whole.startswith(asked):
        raise Unusable(
            "the template's prompt is not a prefix of the template's whole conversation, as where the prompt alone "
            "opens <think>: see model.template_kwargs (enable_thinking: false) and model.chat_template"
        )
    _refuse_lost_prompt(messages, asked)
    prompt, ids = _ids(tokenizer, asked), _ids(tokenizer, whole)
    if ids[: len(prompt)] != prompt:
        raise Unusable("the answer's first characters become one token with the last of the template's prompt")
    if prompt[:2] == [tokenizer.bos_token_id] * 2:
        raise Unusable("the template begins with two BOS tokens")
    answer = ids[len(prompt) :]
    last = next((i for i, token in enumerate(answer) if token in ends), None)
    texts, _ = _controls(tokenizer)
    spoken = whole[len(asked) :]
    if last is None:
        answer.append(int(ends[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id))
    else:
        if answer[last] in texts:
            spoken = spoken.partition(texts[answer[last]])[0]
        answer = answer[: last + 1]
    _refuse_lost_answer(messages, spoken)
    return prompt, answer


def _refuse_controls(tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: tuple[int, ...]) -> None:
    """A control token's text inside a message would be read as that token: a turn, an end or a BOS out of its place."""
    texts, by_start = _controls(tokenizer)
    for i, message in enumerate(messages, start=1):
        content = message["content"]
        held = [text for start, some in by_start.items() if start in content for text in some if text in content]
        if held:
            raise Unusable(f"has the text of a control token, {max(held, key=len)!r} in {_named(messages, i)}")
    plain = set(ends) - texts.keys()  # ends that are ordinary tokens: only the tokenizer can tell where one is
    if plain and plain & set(_ids(tokenizer, messages[-1]["content"])):
        raise Unusable("the answer's text holds a token that ends an answer")


def _refuse_lost_prompt(messages: Messages, asked: str) -> None:
    """Every text of the prompt must stand in what the template made of it, in order, but for blanks around it.

    Of earlier answers a template may drop the thinking.
    """
    at = 0
    for i, message in enumerate(messages[:-1], start=1):
        said = message["content"]
        text = (said.rpartition(THOUGHT)[2] if message["role"] == "assistant" else said).strip()
        if text not in asked[at:]:
            hint = "; dataset.fold_system=true keeps it" if message["role"] == "system" else ""
            raise Unusable(f"has a text that the chat template drops or rewrites, {_named(messages, i)}{hint}")
        at = asked.index(text, at) + len(text)


def _refuse_lost_answer(messages: Messages, spoken: str) -> None:
    """The answer must stand in what the template made of it, its thinking too, but for blanks around each."""
    thinking, _, text = messages[-1]["content"].rpartition(THOUGHT)
    if not text.strip():
        raise Unusable("the answer is empty")
    at = 0
    for part in (*thinking.replace("<think>", "").split(THOUGHT), text):
        if part.strip() not in spoken[at:]:
            raise Unusable(f"has a text that the chat template drops or rewrites, {_named(messages, len(messages))}")
        at = spoken.index(part.strip(), at) + len(part.strip())


def _named(messages: Messages, number: int) -> str:
    return f"message {number} ({messages[number - 1]['role']})"
