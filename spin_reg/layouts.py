"""A row as a conversation: every layout we know, and what is said of a row that is in none of them."""

from dataclasses import dataclass
from typing import Any

from spin_reg.corpora import Corpus, Turns, published
from spin_reg.fingerprint import digest
from spin_reg.render import Messages, Unusable
from spin_reg.tables import Row

ROLES = ("system", "user", "assistant")
SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system"}  # of messages with from and value
LAYOUTS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("prompt", "completion"))
CONVERSATIONS = ("messages", "conversations", "real")  # `real` is the column of SPIN's published data
KINDS = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "a list", str: "text"}


@dataclass(frozen=True)
class Example:
    """A conversation whose last message is the real answer; `number` is its row, from 1; `generated`: a published
    answer to the same prompt, where those are asked for; `own_id`: whether the row itself says its id."""

    example_id: str
    messages: Messages
    number: int
    generated: str | None = None
    own_id: bool = False


def shown(text: str) -> str:
    """A text from the data as an error can show it: quoted, on one line, at most 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def example(row: Any, number: int, dataset: Corpus) -> Example:
    """A row as the conversation it stands for, cut and completed as the settings say.

    Raises:
        Unusable: it is in no layout we know, or a field is not what it must be.
    """
    if isinstance(row, Unusable):
        raise row
    if not isinstance(row, dict):
        raise Unusable(f"is {_kind(row)}, not an object with fields")
    messages, own, generated = _completed(_messages(row), row, dataset), row.get("id"), None
    if published(dataset):
        messages, generated = _published(row, dataset)
    if isinstance(own, str):
        own = _text(row, "id")
    elif own is not None and (isinstance(own, bool) or not isinstance(own, int)):
        raise Unusable(f"has an id that is {_kind(own)}, not text or a whole number")
    return Example(str(own) if own is not None else digest(messages)[:16], messages, number, generated, own is not None)


def _completed(messages: Messages, row: Row, dataset: Corpus) -> Messages:
    """With a system message in front where the row or the settings have one; cut behind the first answer if asked."""
    own = _text(row, "system") if row.get("system") not in (None, "") else None
    has_one = any(message["role"] == "system" for message in messages)
    if own is not None and has_one:
        raise Unusable("has a system prompt twice, as a field and as a message")
    system = own if own is not None or has_one else dataset.system_prompt
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    if dataset.turns is Turns.first:
        answered = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        messages = messages[: answered + 1]
    return messages


def _published(row: Row, dataset: Corpus) -> tuple[Messages, str]:
    """A row in the layout of SPIN's published data: the real conversation, and the generated answer to its prompt."""
    for key in ("real", "generated"):
        if key not in row:
            raise Unusable(f"has no {key}, which dataset.generated=published needs")
    real = _completed(_conversation(row["real"], "real"), row, dataset)
    generated = _completed(_conversation(row["generated"], "generated", may_be_empty=True), row, dataset)
    if real[:-1] != generated[:-1]:
        raise Unusable("has a real and a generated with different prompts")
    return real, generated[-1]["content"]


def _messages(row: Row) -> Messages:
    for prompt, response in LAYOUTS:
        if prompt in row and response in row:
            if isinstance(row[prompt], list) and response == "completion":
                return _conversation(_joined(row[prompt], row[response]), "prompt and completion")
            asked = _text(row, prompt)
            if prompt == "instruction" and row.get("input"):
                asked = f"{asked}\n\n{_text(row, 'input')}"
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": _text(row, response)}]
    for key in CONVERSATIONS:
        if key in row:
            return _conversation(_in_our_words(row[key]) if key == "conversations" else row[key], key)
    for layout in LAYOUTS:
        for there, missing in (layout, layout[::-1]):
            if there in row:
                raise Unusable(f"has a field {there} but no {missing}")
    names = ", ".join(shown(name) for name in sorted(row)[:5]) + (", ..." if len(row) > 5 else "")
    known = ", ".join("/".join(layout) for layout in LAYOUTS)
    raise Unusable(f"has the fields [{names}]; needed: {known}, messages or conversations")


def _joined(prompt: list[Any], completion: Any) -> list[Any]:
    """A prompt and its completion, as lists of messages, in one."""
    if not isinstance(completion, list):
        raise Unusable(f"has a completion that is {_kind(completion)} beside a prompt that is a list")
    return [*prompt, *completion]


def _in_our_words(value: Any) -> Any:
    """Messages written with from and value as messages with role and content; what is none stays as it is."""
    if not isinstance(value, list):
        return value
    made = []
    for i, message in enumerate(value, start=1):
        if isinstance(message, dict) and "from" in message:
            speaker = message["from"]
            if not isinstance(speaker, str) or speaker not in SPEAKERS:
                raise Unusable(f"has a message {i} in conversations that is not from {', '.join(SPEAKERS)}")
            message = {"role": SPEAKERS[speaker], "content": message.get("value")}
        made.append(message)
    return made


def _kind(value: Any) -> str:
    return "an object" if isinstance(value, dict) else KINDS.get(type(value), type(value).__name__)


def _text(row: Row, key: str, of: str = "", *, may_be_empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise Unusable(f"has a {key}{of} that is {_kind(value)}, not text")
    if not value.strip() and not may_be_empty:
        raise Unusable(f"has an empty {key}{of}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Unusable(f"has a {key}{of} with half a surrogate pair, which is no text") from None
    return value


def _conversation(value: Any, key: str, *, may_be_empty: bool = False) -> Messages:
    if not isinstance(value, list) or not value:
        raise Unusable(f"has {key} that are not a list of messages")
    messages: Messages = []
    for i, message in enumerate(value, start=1):
        if not isinstance(message, dict):
            raise Unusable(f"has a message {i} in {key} that is {_kind(message)}, not an object with role and content")
        if message.get("role") not in ROLES:
            raise Unusable(f"has a message {i} in {key} without a role among {', '.join(ROLES)}")
        empty = may_be_empty and i == len(value)  # of the last alone: an answer may be nothing but its end
        content = _text(message, "content", f" of message {i} in {key}", may_be_empty=empty)
        messages.append({"role": message["role"], "content": content})
    turns = [m["role"] for m in messages if m["role"] != "system"]
    if turns[-1:] != ["assistant"] or turns != ["user", "assistant"] * (len(turns) // 2):
        raise Unusable(f"has {key} that do not alternate user, assistant, ..., ending with the assistant's answer")
    return messages
