"""What people call the parts of a row: a prompt as text or as messages, its answer, its worked solution, in the forms of the
public datasets and of other trainers, or under names that data.columns gives. Texts in, texts out: it reads no file, and what a
row must have is for rows.py and preferences.py to say.

    prompt      problem, question, prompt, conversation(s), messages, instruction (with Alpaca's input), input
    answer      answer, final_answer, expected_answer, ground_truth, reward_model.ground_truth (verl), label
    solution    solution, completion, response, output, or the assistant's turn that ends a conversation
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from engine.core.errors import DataError, brief
from engine.core.types import Message
from engine.data.records import CONVERSATIONS

Record = Mapping[str, Any]
Columns = Mapping[Any, str]  # data.columns: what we call a column -> its dotted path in a row

PROMPTS = ("problem", "question", "prompt", "conversation", "conversations", "messages", "instruction", "input")
ANSWERS = ("answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth", "label")
SOLUTIONS = ("solution", "completion", "response", "output")
SOURCES = ("source", "data_source")
LABELS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}  # ShareGPT's names of roles
ROLES = ("system", "developer", "user", "assistant", "tool")


class Asked(NamedTuple):
    """What a row asks."""

    text: str  # the last user's message; empty where there is none
    messages: tuple[Message, ...]  # the whole conversation up to it, where the text is not all of it
    response: str  # the assistant's turn behind it; empty without one
    column: str  # where it was found; empty where it was not


def heads(*names: str) -> tuple[str, ...]:
    """The columns that dotted paths begin in."""
    return tuple(dict.fromkeys(part for name in names for part in (name, name.split(".")[0])))


def found(record: Record, path: str) -> Any:
    """The value at a dotted path of names, and numbers of places in lists; None where there is none. A column whose own name
    has dots in it is found by it."""
    if path in record:
        return record[path]
    value: Any = record
    for name in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list) and name.isdigit() and int(name) < len(value):
            value = value[int(name)]
        else:
            return None
    return value


def named(where: str, record: Record, columns: Columns, name: str, *, required: bool = True) -> Any:
    """The value that data.columns names; None where it names none. DataError where the row has no such value and one is
    `required`."""
    path = columns.get(name)
    value = None if path is None else found(record, path)
    if path is not None and value is None and required:
        raise DataError(
            f"{where}: the row must have `{path}`, which data.columns.{name} names; found {brief(sorted(record))}: mend the "
            f"path, or the row"
        )
    return value


def asked(where: str, record: Record, columns: Columns) -> Asked:
    """The prompt of a row: the first that says anything of those that data.columns or PROMPTS name. A text is a user's message;
    of a list of messages all turns are kept, and an assistant's that ends it is the response.

    DataError for a list that cannot be followed: other roles, tool calls, pictures, an end that is no user's turn.
    """
    candidates: list[tuple[str, Any]]
    if "problem" in columns:
        candidates = [(columns["problem"], named(where, record, columns, "problem"))]
    else:
        candidates = [(name, record.get(name)) for name in PROMPTS]
    for name, value in candidates:
        if isinstance(value, list):
            turns = messages_of(where, name, value) if _are_messages(value) else ()
            if any(role == "user" for role, _ in turns):
                return _ended(where, name, turns, record)
        if name not in CONVERSATIONS or name == "prompt":
            if isinstance(value, list) and _are_messages(value):
                continue
            text = text_of(where, {name: value}, name)
            if text and name == "instruction" and "problem" not in columns:
                text = "\n\n".join(filter(None, (text, text_of(where, record, "input"))))
            if text:
                return Asked(text, (), "", name)
    return Asked("", (), "", "")


def _ended(where: str, name: str, turns: tuple[Message, ...], record: Record) -> Asked:
    """A conversation cut into the prompt and the response that ends it."""
    response = ""
    if turns[-1][0] == "assistant" and name.split(".")[-1] != "prompt":
        *before, (_, response) = turns
        turns = tuple(before)
    if turns[-1][0] != "user":
        raise DataError(
            f"{where}: the turns of `{name}` must end with a user's, or with an assistant's answer behind one where they are "
            f"no prompt; found {[role for role, _ in turns]}: mend it"
        )
    return Asked(turns[-1][1], turns if len(turns) > 1 else (), response, name)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def messages_of(where: str, name: str, value: Any) -> tuple[Message, ...]:
    """(role, text) of a list of messages, as `role` and `content` or ShareGPT's `from` and `value`, without blank ones.
    DataError names the message that cannot be followed."""
    turns: list[Message] = []
    for place, message in enumerate(value):
        label = f"{name}[{place}]"
        said, key = ("role", "content") if message.get("role") is not None else ("from", "value")
        role = LABELS.get(str(message.get(said)), message.get(said))
        if role not in ROLES:
            raise DataError(
                f"{where}: `{label}.{said}` must be one of {', '.join(ROLES)}; found {brief(message.get(said))}: rename it"
            )
        if message.get("tool_calls"):
            raise DataError(f"{where}: `{label}` must be text; found tool calls, which are not followed: leave the row out")
        content = message.get(key)
        if isinstance(content, list):
            content = _joined(where, f"{label}.{key}", content)
        text = text_of(where, {f"{label}.{key}": content}, f"{label}.{key}")
        if text:
            turns.append((role, text))
    return tuple(turns)


def _joined(where: str, label: str, parts: list[Any]) -> str:
    """The text of a content in parts. DataError for a part that is none, such as an image."""
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            raise DataError(f"{where}: `{label}` must be text; found {brief(part)}: leave the row out")
    return "".join(part["text"] for part in parts)


def response_of(where: str, name: str, value: Any) -> tuple[tuple[Message, ...], str]:
    """(the messages before it, the text) of a response that is a text, a message, or a list of messages that ends in it; the
    text is empty where there is none. DataError for anything else."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not (value == [] or _are_messages(value)):
        return (), text_of(where, {name: value}, name)
    turns = messages_of(where, name, value)
    if turns and turns[-1][0] == "assistant":
        return turns[:-1], turns[-1][1]
    if turns and len(turns) == len(value):
        raise DataError(
            f"{where}: the messages of `{name}` must end with an assistant's; found {[role for role, _ in turns]}: mend it"
        )
    return turns, ""


def solution_of(where: str, record: Record, columns: Columns) -> tuple[str, str]:
    """(The worked solution, the column it is in); empty where the row has none. Of the columns besides `solution`, and those
    that data.columns names, one that is no text is passed over: a reward may know what it is."""
    if "solution" in columns:
        value = named(where, record, columns, "solution")
        return response_of(where, columns["solution"], value)[1], columns["solution"]
    for name in SOLUTIONS:
        value = record.get(name)
        if value is None or (name != "solution" and not (isinstance(value, (str, dict)) or _are_messages(value))):
            continue
        if name != "solution" and isinstance(value, dict) and "content" not in value:
            continue
        if text := response_of(where, name, value)[1]:
            return text, name
    return "", ""


def answer_of(where: str, record: Record, columns: Columns, *, required: bool) -> str:
    """The gold answer as the row writes it, numbers in digits; empty where the row has none. A value that is neither is a
    DataError where an answer is `required`, and else passed over."""
    names = (columns["answer"],) if "answer" in columns else ANSWERS
    if "answer" in columns:
        named(where, record, columns, "answer", required=required)
    for name in names:
        value = found(record, name)
        if not required and not (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
            continue
        if text := text_of(where, {name: value}, name, numbers=True):
            return text
    return ""


def marked(text: str) -> str | None:
    """What follows GSM8K's mark, the #### that begins the last line of a worked answer, without the commas that group digits;
    None without a mark there, empty where nothing follows it."""
    if "####" not in text:
        return None
    line = text.strip().rpartition("\n")[2]
    return line.removeprefix("####").strip().replace(",", "") if line.startswith("####") else None


def text_of(where: str, record: Record, field: str, numbers: bool = False) -> str:
    """The field as text; empty when it is absent, null or blank. A number is written out in
    its shortest digits, without an exponent (0.00001, not 1e-05), and without a decimal point where it is whole."""
    value = record.get(field)
    if value is None:
        return ""
    if numbers and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return format(Decimal(repr(value)), "f").removesuffix(".0") if value else "0"
    if not isinstance(value, str):
        kinds = "a text or a finite number" if numbers else "a text"
        raise DataError(f"{where}: `{field}` must be {kinds}; found {brief(value)}: write it as text")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: `{field}` must be whole characters; found half a pair in {brief(value)}: mend it")
    return value if value.strip() else ""
