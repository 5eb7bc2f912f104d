"""Conversations to token ids: one renderer for sampling and training alike."""

from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerBase

from spin_reg.errors import ConfigError

Messages = list[dict[str, str]]


class Unusable(Exception):
    """Why a row cannot be used."""


def _ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, **kwargs: Any) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs))
    except (TemplateError, OverflowError, RecursionError) as error:
        if type(error) is TemplateError:  # the template's own raise_exception, about these messages
            raise Unusable(f"is refused by the chat template: {error}") from error
        escape = "it reaches for what templates may not touch, " if isinstance(error, SecurityError) else ""
        raise ConfigError(
            "The model's chat template cannot be used.",
            where=f"the chat template of {tokenizer.name_or_path}",
            why=f"{escape}{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            todo="use a model with a sound chat template",
        ) from error


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The prompt with the template's generation prompt at its end: what is sampled from and trained on."""
    return _ids(tokenizer, messages, add_generation_prompt=True)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, ends: tuple[int, ...]
) -> tuple[list[int], list[int]]:
    """A conversation whose last message is the real answer, as (prompt ids, real answer's ids).

    The answer ends with exactly one end token, after which nothing follows (what a template puts behind its end of
    turn is cut off; where it puts no end token, the tokenizer's eos is added).

    Raises:
        Unusable: the prompt is not a prefix of the whole, the answer is empty, or it holds an end token inside.
    """
    prompt = prompt_ids(tokenizer, messages[:-1])
    whole = _ids(tokenizer, messages)
    if whole[: len(prompt)] != prompt:
        raise Unusable("the template's prompt is not a prefix of the template's whole conversation")
    answer = whole[len(prompt) :]
    if set(ends) & set(tokenizer.encode(messages[-1]["content"], add_special_tokens=False)):
        raise Unusable("the answer's text holds a token that ends an answer")
    ended = [i for i, token in enumerate(answer) if token in ends]
    if not ended:
        answer, ended = [*answer, int(tokenizer.eos_token_id)], [len(answer)]
    answer = answer[: ended[0] + 1]
    if len(answer) == 1:
        raise Unusable("the answer is empty")
    return prompt, answer
