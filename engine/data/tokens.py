"""From texts to tokens so that what a row says stays text: the written form of a special token, such as <|eot_id|>, becomes the
characters that it is written in, and not the token, unless a chat template wrote it. Also how few tokens a long text can have,
without making them. It knows no rows and no templates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

from tokenizers import pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAND_INS = range(0xF0000, 0x10FFFE)  # characters that no text has by agreement: planes 15 and 16, private use
COMPOSED = 4  # characters that one of a composed normal form is made of at most (UAX 15)
NORMAL_FORMS = {"NFC": COMPOSED, "NFKC": COMPOSED, "NFD": 1, "NFKD": 1, "Prepend": 1}


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, end: str = "") -> tuple[int, ...] | None:
    """Token ids of a text, all of which somebody wrote: nothing in it is a special token. A written `end` at its end, with or
    without white space behind, is left off, for whoever asks puts the token there. None where the tokenizer cannot keep it
    text."""
    if end and (stripped := text.rstrip()).endswith(end):
        return encode_text(tokenizer, stripped.removesuffix(end), end)
    return encode_around(tokenizer, [text], lambda texts: texts[0])


def stays_text(tokenizer: PreTrainedTokenizerBase, text: str, end: str = "") -> bool:
    """Whether `encode_text` has tokens for a text; quick where it spells no special token."""
    special = special_texts(tokenizer)
    return special is None or not special.search(text) or encode_text(tokenizer, text, end) is not None


def encode_around(
    tokenizer: PreTrainedTokenizerBase,
    contents: Sequence[str],
    render: Callable[[Sequence[str]], str],
) -> tuple[int, ...] | None:
    """Token ids of what `render` makes of contents that somebody wrote: special tokens where it writes them, text where the
    contents do.

    Where no content holds the text of a special token these are the ids of the rendered text, bit for bit. Else the text is
    cut at the special tokens that `render` wrote, as a tokenizer itself does first, and each piece encoded for itself; None
    where that gives other tokens than the whole, as with a tokenizer that treats the beginning of a text apart.
    """
    special = special_texts(tokenizer)
    written = {text for content in contents for text in special.findall(content)} if special is not None else set()
    if special is None or not written:
        return _joint(tokenizer, render(contents))
    used = {*render(contents)}
    free = islice((chr(code) for code in STAND_INS if chr(code) not in used), len(written))
    stand_ins = dict(zip(sorted(written), free, strict=True))
    around = render([special.sub(lambda match: stand_ins[match[0]], content) for content in contents])
    alike = around.translate({ord(stand_in): "?" for stand_in in stand_ins.values()})
    if _pieces(tokenizer, special, alike, {}) != _joint(tokenizer, alike):
        return None
    ids = _pieces(tokenizer, special, around, {ord(stand_in): text for text, stand_in in stand_ins.items()})
    return ids if _num_special(tokenizer, ids) == _num_special(tokenizer, _joint(tokenizer, alike)) else None


def _num_special(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many of the ids are special tokens, but for the unknown one, which stands for text."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    return sum(number in special for number in ids)


def _pieces(tokenizer: PreTrainedTokenizerBase, special: re.Pattern[str], text: str, meant: dict[int, str]) -> tuple[int, ...]:
    """The tokens of `text` piece by piece: its special tokens, and between them nothing but text, in which every character that
    stands for another text is that text."""
    ids: list[int] = []
    start = 0
    for match in special.finditer(text):
        ids += _plain(tokenizer, text[start : match.start()].translate(meant))
        ids.append(tokenizer.convert_tokens_to_ids(match[0]))
        start = match.end()
    return (*ids, *_plain(tokenizer, text[start:].translate(meant)))


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text without any special one."""
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return ids


def _joint(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def special_texts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the written forms of the tokenizer's special tokens, the longest first; None where it has none."""
    return _special_texts(tokenizer, len(tokenizer))


@lru_cache(maxsize=8)
def _special_texts(tokenizer: PreTrainedTokenizerBase, size: int) -> re.Pattern[str] | None:
    texts = {str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special and token.content}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def fewest_tokens(tokenizer: PreTrainedTokenizerBase, num_characters: int) -> int:
    """Tokens that a text of so many characters has at least; 0 where nothing can be said without making them.

    Of a BPE over bytes (or with a fallback to them) no character is lost, so a text has at least its characters divided by
    those of the longest token. A normal form may have put some together, which is allowed for; a pre-tokenizer that drops text,
    or a token that eats white space, leaves nothing to say.
    """
    longest = _longest_token(tokenizer, len(tokenizer))
    return -(-num_characters // longest) if longest else 0


@lru_cache(maxsize=8)
def _longest_token(tokenizer: PreTrainedTokenizerBase, size: int) -> int:
    """Characters of a text that one token stands for at most; 0 where that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or json.loads(backend.model.__getstate__())["type"] != "BPE":
        return 0
    vocabulary = tokenizer.get_vocab()
    steps = _steps(backend.pre_tokenizer)
    in_bytes = any(step["type"] == "ByteLevel" for step in steps) and vocabulary.keys() >= {
        *pre_tokenizers.ByteLevel.alphabet()
    }
    falls_back = backend.model.byte_fallback and vocabulary.keys() >= {f"<0x{byte:02X}>" for byte in range(256)}
    keeps = all(
        step["type"] in ("ByteLevel", "Metaspace", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
    eats = any(token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values())
    if not (in_bytes or falls_back) or not keeps or eats:
        return 0
    factor = 1
    for step in _steps(backend.normalizer):
        if step["type"] == "Replace" and len(step["pattern"].get("String", "")) in range(1, len(step["content"]) + 1):
            continue
        factor *= NORMAL_FORMS.get(step["type"], 0)
    return factor * max(map(len, vocabulary))


def _steps(component: Any) -> list[dict[str, Any]]:
    """The parts of a tokenizer's normalizer or pre-tokenizer, in order."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return _flat(state)


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    inner = state.get("pretokenizers") or state.get("normalizers")
    return [part for step in inner for part in _flat(step)] if inner else [state]
