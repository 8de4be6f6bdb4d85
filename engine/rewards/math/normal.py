r"""One way to write an answer: the rewrites that change how LaTeX looks and not what it says, applied to the gold answer and
to the given one alike. Two answers of one `key` are the same text and need no algebra. Knows nothing of what an answer is
worth; standard library only, and linear in time.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"√(\d+)")
_SIGNS = {
    **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "±": r"\pm "},
    **{"≈": r"\approx ", "≃": r"\approx ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne "},
    **{"∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "∅": r"\emptyset ", "∣": "|"},
    **{"°": r"^\circ ", "√": r"\sqrt ", "→": r"\to ", "′": "'", "″": "''", "’": "'", "∠": r"\angle ", "∨": r"\lor "},
    **{
        "¢": r"\text{ cents}",
        "Ω": r"\Omega ",
        "µ": r"\mu ",
        "ℝ": r"\mathbb{R}",
        "ℤ": r"\mathbb{Z}",
        "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}",
        "ℂ": r"\mathbb{C}",
    },
    **{"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "ε": r"\epsilon ", "θ": r"\theta ", "λ": r"\lambda "},
    **{"μ": r"\mu ", "π": r"\pi ", "ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega "},
}


def words_of(text: str) -> frozenset[str]:
    """The words of a list that is written as one text."""
    return frozenset(text.split())


def plain(text: str) -> str:
    """The text with digits, letters, scripts, fractions and signs of Unicode as LaTeX writes them."""
    if text.isascii():
        return text
    raised = _SUPERSCRIPT.sub(lambda found: "^{" + found[0].translate(_SUPERSCRIPTS) + "}", text)
    lowered = _SUBSCRIPT.sub(lambda found: "_{" + found[0].translate(_SUBSCRIPTS) + "}", raised)
    rooted = _ROOT.sub(r"\\sqrt{\1}", lowered)
    return "".join(character if character.isascii() else _plain_character(character) for character in rooted)


def _plain_character(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    decomposed = unicodedata.normalize("NFKC", character)  # full width, mathematical letters, fractions, spaces
    numerator, slash, denominator = decomposed.partition("⁄")
    if slash and numerator.isdecimal() and denominator.isdecimal():
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    return decomposed if decomposed.isascii() else character


_DROPPED = (
    "left right middle bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm big Big bigg Bigg displaystyle textstyle "
    "scriptstyle scriptscriptstyle limits nolimits rm bf it sf tt cal boldsymbol bm pmb underline mleft mright strut "
    "centering noindent large Large small tiny normalsize dotfill hfill checkmark blacksquare qed"
)
_SPACES = "quad qquad thinspace enspace space medspace thickspace , ; : > / newline"
_TEXTS = (
    "text textbf textrm textit texttt textsf textnormal textup textsc textmd mbox hbox emph mathrm mathit mathsf mathtt "
    "mathbf mathup mathnormal"
)
_SAME = {
    **{"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "choose": "choose"},
    **{"leq": "le", "leqslant": "le", "leqq": "le", "geq": "ge", "geqslant": "ge", "geqq": "ge", "neq": "ne"},
    **{"varnothing": "emptyset", "infin": "infty", "rightarrow": "to", "longrightarrow": "to", "ast": "cdot", "bullet": "cdot"},
    **{"simeq": "approx", "thickapprox": "approx", "approxeq": "approx", "doteq": "approx", "backslash": "setminus"},
    **{
        "smallsetminus": "setminus",
        "vee": "lor",
        "wedge": "land",
        "varepsilon": "epsilon",
        "varphi": "phi",
        "vartheta": "theta",
    },
    **{"dots": "ldots", "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "dotso": "ldots", "ddots": "ldots"},
    **{"overleftrightarrow": "overline", "overrightarrow": "vec", "widehat": "hat", "arsinh": "arcsinh", "tg": "tan"},
    "lg": "log_{10}",
}
_WRITTEN = {
    **dict.fromkeys(_DROPPED.split(), ""),
    **dict.fromkeys(_SPACES.split(), " "),
    **dict.fromkeys(_TEXTS.split(), r"\text"),
    **{" ": " ", "\n": " ", "\t": " ", "!": "", "(": " ", ")": " ", "[": " ", "]": " ", "$": "", "-": "", "#": "#", "&": "&"},
    **{"lbrace": r"\{", "rbrace": r"\}", "lbrack": "[", "rbrack": "]", "lparen": "(", "rparen": ")", "lt": "<", "gt": ">"},
    **{"mid": "|", "vert": "|", "lvert": "|", "rvert": "|", "colon": ":", "prime": "'", "degree": r"^{\circ}"},
    **{"R": r"\mathbb{R}", "reals": r"\mathbb{R}", "Reals": r"\mathbb{R}", "percent": r"\%", "dollar": "", "textdollar": ""},
    **{"pounds": "", "euro": "", "texteuro": "", "displaymath": "", "medskip": "", "phantom": r"\phantom"},
}
_COMMAND = re.compile(r"\\(?:([a-zA-Z]+)\*?[ \t\n]*|(.))", re.DOTALL)
_NULL_DELIMITER = re.compile(r"\\m?(?:left|right)\s*\.")
_SEPARATED = re.compile(
    r"(?<![\d.,_^])(?<!\^\{)\d{1,3}(?:(?:,\\!|\{,\}|\\[!,;: _]|~|'| |\\thinspace )\s?\d{3})+(?![\d'])(?!\s*/)"
)
_SEPARATED_BY_COMMAS = re.compile(
    r"(?P<before>(?:[^=,()\[\]{}]*=)?[-+\s]*)(?P<number>\d{1,3}(?:,\d{3})+)(?![\d,])(?P<after>[^,]*)", re.DOTALL
)
_SEPARATED_BY_PAIRS = re.compile(  # 12{,}34{,}567; with bare commas it may be a list (forms.grouped_by_pairs)
    r"(?<![\d.,_^])\d{1,2}(?:(?:,\\!|\{,\})\d{2})+(?:,\\!|\{,\})\d{3}(?![\d'])"
)
_SEPARATED_BY_DOTS = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.])")
_NOT_A_DIGIT = re.compile(r"\D+")
_MATH_MARK = re.compile(r"(?<!\\)\$\$?")
_WORD = re.compile(r"[A-Za-z]{2}")
_COLOR = re.compile(r"\\(?:textcolor|color|colorbox)\s*\{[^{}]*\}")
_HSPACE = re.compile(r"\\[hv]space\*?\s*\{[^{}]*\}")
_E_NOTATION = re.compile(
    r"(?<![\d.\\_])(\d+(?:\.\d*)?|\.\d+)[ ]?(?:[eE]|\\text\{\s*[eE]\s*\})\s*(?:\{([-+]?\d+)\}|([-+]?\d+))(?!\d|\.\d)"
)
_TIMES_TEN = re.compile(
    r"(?<=\d)\s*(?:\\times|\\cdot|\*|[xX])\s*(?:10|\{\s*10\s*\})\s*(?:\^|\*\*)\s*(?:\{\s*)?\+?(-?\d+)(?:\s*\})?"
)
_SCRIPT = re.compile(r"([_^])\s*([a-zA-Z]|\d(?!\d))")
_SCRIPT_COMMAND = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ\b)")
_SCRIPT_PRIMES = re.compile(r"\^\s*\{\s*('+)\s*\}|\^('+)")
_BARE_FRACTION = re.compile(
    r"\\frac\s*(?:(\d)\s*(\d)|(\d)\s*(?=\{)|(\{[^{}]*\})\s*(\d)|([a-zA-Z])\s*([a-zA-Z\d])|(\d)\s*([a-zA-Z]))"
)
_BARE_MARK = re.compile(r"\\(overline|bar|dot)\s*(\d)")
_BARE_ROOT = re.compile(r"\\sqrt\s*(\d|[a-zA-Z])")
_OPERATOR_NAME = re.compile(
    r"\\(?:operatorname\*?|text)\s*\{\s*(sin|cos|tan|cot|sec|csc|sinh|cosh|tanh|arcsin|arccos|arctan|ln|log|exp|gcd|lcm|det|max|min)"
    r"\s*\}(?=\s*[\\({^_a-zA-Z\d])"
)
_COMPARED = re.compile(r"<=|>=|!=|/=|=<|~=|==")
_COMPARISONS = {"<=": r"\le ", "=<": r"\le ", ">=": r"\ge ", "!=": r"\ne ", "/=": r"\ne ", "~=": r"\approx ", "==": "="}
_DOTS = re.compile(r"\.{3,}")
_ABOUT = re.compile(r"^\s*(?:\{\s*\\sim\s*\}|\\sim(?![a-zA-Z]))(?:\s|\\!)*(?=[-+.\d]|\\d?frac)")
_BOLD_SET = re.compile(
    r"(?:^\s*(?:\\mathbf|\\boldsymbol|\\bf|\\pmb)|(?<=\\in)\s*\\(?:mathbf|boldsymbol|bf|pmb|mathrm|text))\s*\{?\s*([RZQ])\s*\}?"
    r"(?=\s*(?:$|[.,^]|-\s*\\\{|\\(?:setminus|backslash|smallsetminus)))"
)
_LANDAU = re.compile(r"\\mathcal\s*(?:\{\s*O\s*\}|O)(?=\s*(?:\\left)?\s*\()")
_UNIT_VECTOR = re.compile(
    r"\\(?:hat|widehat|vec|mathbf|boldsymbol|bm|pmb|overrightarrow)\s*\{\s*"
    r"(?:\\(?:hat|widehat|vec|mathbf|boldsymbol)\s*\{\s*\\?([ijk])(?:math)?\s*\}|\\?([ijk])(?:math)?)\s*\}"
)
_ANGLES = re.compile(r"\\langle(?![a-zA-Z])([^<>]*?,[^<>]*?)\\rangle(?![a-zA-Z])")
_CHOOSE = re.compile(r"\{([^{}]+)\\choose(?![a-zA-Z])([^{}]+)\}")
_CHOSEN_FROM = re.compile(r"(?<![\w}])(?:\{\s*\}\s*)?_\s*(?:\{(\w+)\}|(\w))\s*C\s*_\s*(?:\{(\w+)\}|(\w))")
_EMPTY = re.compile(r"\\\{\s*\\\}")
_EMPTY_TEXT = re.compile(r"\\text\s*\{\s*\}|(?<![\\a-zA-Z\d}\]])\{\s*\}")
_TEXT_SPACE = re.compile(r"\\text\s+\{")
_BLANK = re.compile(r"\s+")
_MARKUP = re.compile(r"(?:\*\*|`)([^*`]+)(?:\*\*|`)")
_BASE_NAMES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "sixteen": 16,
}
_BASE = re.compile(
    r"(?<=\d)(?:\s*_\s*\{?\s*\\text\{\s*(?:\(?base[\s~]*)?(\w+)\)?\s*\}\s*\}?|\s*\\text\{\s*\(?base[\s~]*(\w+)\)?\s*\})",
    re.IGNORECASE,
)
_ORDINAL = re.compile(r"(?<=\d)\s*(?:\^\s*\{?\s*)?(?:\\text\{\s*(?:st|nd|rd|th)\s*\}\s*\}?|(?:st|nd|rd|th)\b)")
_LETTERS_IN_TEXT = re.compile(r"\\text\{\s*([A-J](?:\s*(?:,|and\b|or\b|&)+\s*[A-J](?![a-zA-Z]))+)\s*\}")
_NUMBER_IN_TEXT = re.compile(r"\\text\{\s*([-+]?\d(?:[\d.,:]*\d)?)(?:\s*([^\d{}.\s][^{}]*))?\}")
_PERCENT = re.compile(
    r"(?<=[\d}])\s*(?:\\text\s*\{\s*(?:percent|per cent|pct|\\?%)\.?\s*\}|\b(?:percent|pct)\b|\\?%)", re.IGNORECASE
)
_HALF_DAY = re.compile(r"(?<=[\d\s{~])([aApP])\.\s?([mM])\b\.?")  # a.m. is am
_LARGEST_OF = re.compile(r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}")
_OHM = re.compile(r"(?<=[\d}\s])\s*(?:\\text\s*\{\s*([kM])\s*\}\s*)?\\Omega\s*$")
_MICRO = re.compile(r"(?<=[\d}\s])\s*\\mu\s*\\text\s*\{\s*(m|s|g|A|V|F|C|L|J|W)\s*\}")
_INFINITY = re.compile(r"(?<![\\a-zA-Z])([-+]?)\s*(?:\\text\s*\{\s*infinity\s*\}|infinity)(?![a-zA-Z])")
_MONEY = re.compile(r"\s*(?P<sign>-?)\s*\\\$\s*(?P<amount>-?\d(?:[\d,]|\{,\}|,?\\!)*(?:\.\d+)?)\s*\.?\s*")
_END = " .,;:"


def normal(latex: str) -> str:
    """The answer in one way of writing: delimiters, sizes, spacing and styles gone, one command for each sign, e-notation as
    a power of ten, digits without separators, scripts and arguments in braces, every font command `\\text`."""
    text = plain(latex)
    if (money := _MONEY.fullmatch(text)) is not None:
        text = rf"{money['sign']}{money['amount']} \text{{ dollars}}"
    text = _between_dollars(text.replace("\\$", " ").strip())
    text = _with_braces(_with_plain_numbers(_unstyled(text)))
    return unwrapped(_BLANK.sub(" ", text).strip().rstrip(_END))


def _unstyled(text: str) -> str:
    """One command for each sign, none for sizes, spaces and colours, and no text that holds nothing but a number."""
    if (bold := _MARKUP.fullmatch(text)) is not None:
        text = bold[1]
    text = _HSPACE.sub(" ", _COLOR.sub("", _NULL_DELIMITER.sub(" ", text)))
    text = _ABOUT.sub(r"\\approx ", _LANDAU.sub("O", _BOLD_SET.sub(r" \\mathbb{\1}", text)))
    text = _ANGLES.sub(r"(\1)", _unit_vectors(_CHOSEN_FROM.sub(_binomial, _CHOOSE.sub(_binomial, text)))).replace("{:}", ":")
    text = _SEPARATED.sub(_digits, _SEPARATED_BY_PAIRS.sub(_digits, text))  # before the commands that separate them are gone
    text = _COMMAND.sub(_command, text.replace("~=", r"\approx ")).replace("~", " ")
    text = _COMPARED.sub(lambda found: _COMPARISONS[found[0]], _DOTS.sub(r"\\ldots ", text))
    text = _LARGEST_OF.sub(r"\\\1(\2)", _INFINITY.sub(r"\1\\infty ", _HALF_DAY.sub(r"\1\2", text)))
    text = _MICRO.sub(r" \\text{ u\1}", _OHM.sub(r" \\text{ \1ohm}", text))
    text = _EMPTY_TEXT.sub(" ", _TEXT_SPACE.sub(r"\\text{", text))
    text = _LETTERS_IN_TEXT.sub(r"\1", _EMPTY.sub(r"\\emptyset ", text))
    if (written := _NUMBER_IN_TEXT.fullmatch(text.strip().rstrip(_END))) is not None:
        return written[1] + (rf" \text{{{written[2]}}}" if written[2] else "")
    return text


def _unit_vectors(text: str) -> str:
    """The text with the unit vectors of an expression in one dress; a letter that stands alone may be anything."""
    letters = {found[1] or found[2] for found in _UNIT_VECTOR.finditer(text)}
    if len(letters) < 2:
        return text
    return _UNIT_VECTOR.sub(lambda found: rf"\hat{{{found[1] or found[2]}}}", text)


def _binomial(found: re.Match[str]) -> str:
    above, below = (part.strip() for part in found.groups() if part is not None)
    return rf"\binom{{{above}}}{{{below}}}"


def _with_plain_numbers(text: str) -> str:
    """Numbers without separators, ordinals and words for their base; e-notation as a power of ten."""
    text = _SEPARATED_BY_DOTS.sub(_digits, text)
    if (grouped := _SEPARATED_BY_COMMAS.fullmatch(text.rstrip(_END))) is not None:
        text = grouped["before"] + _NOT_A_DIGIT.sub("", grouped["number"]) + grouped["after"]
    text = _TIMES_TEN.sub(r"\\times 10^{\1}", _E_NOTATION.sub(r"\1\\times 10^{\2\3}", text))
    return _ORDINAL.sub("", _BASE.sub(_base, _PERCENT.sub(r"\\%", text)))


def _with_braces(text: str) -> str:
    """Scripts and arguments in braces."""
    text = _SCRIPT_COMMAND.sub(r"^{\\circ}", text)
    text = _SCRIPT.sub(r"\1{\2}", _SCRIPT_PRIMES.sub(r"\1\2", text))
    text = _BARE_FRACTION.sub(_fraction, _BARE_MARK.sub(r"\\\1{\2}", text))
    return _OPERATOR_NAME.sub(r"\\\1 ", _BARE_ROOT.sub(r"\\sqrt{\1}", text))


def _digits(found: re.Match[str]) -> str:
    return _NOT_A_DIGIT.sub("", found[0])


def _between_dollars(text: str) -> str:
    """Without the marks of mathematics; what stands outside of them and has words is `\\text`."""
    if "$" not in text:
        return text
    parts = _MATH_MARK.split(text)
    if len(parts) % 2 == 0:
        return " ".join(parts)
    for place in range(0, len(parts), 2):
        outside = parts[place]
        if _WORD.search(outside) and not any(sign in outside for sign in "\\{}"):
            parts[place] = rf"\text{{{outside}}}"
    return "".join(parts)


def _command(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    if name in _WRITTEN:
        return _WRITTEN[name]
    if found[1] is None:
        return found[0]
    letter_follows = found.string[found.end() : found.end() + 1].isalpha()
    return "\\" + _SAME.get(name, name) + (" " if letter_follows else "")


def _fraction(found: re.Match[str]) -> str:
    both = [part.strip("{}") for part in found.groups() if part is not None]
    return r"\frac" + "".join(f"{{{part}}}" for part in both)


def _base(found: re.Match[str]) -> str:
    name = (found[1] or found[2]).lower()
    if name.isdecimal() or name in _BASE_NAMES:
        return f"_{{{_BASE_NAMES.get(name, name)}}}"
    return found[0]


def unwrapped(text: str) -> str:
    """Without a pair of braces round the whole."""
    while text.startswith("{") and text.endswith("}") and closing(text, 0) == len(text) - 1:
        text = text[1:-1].strip().rstrip(_END)
    return text


_OPENING, _CLOSING = "([{", ")]}"


def closing(text: str, start: int) -> int:
    """Where the bracket at `start` is closed, whatever the kinds of brackets (half-open intervals); -1 where it is not."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] in _OPENING:
            depth += 1
        elif text[place] in _CLOSING:
            depth -= 1
            if depth == 0:
                return place
    return -1


def split(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The text cut at what the pattern finds outside of all brackets."""
    parts: list[str] = []
    depth, start, place = 0, 0, 0
    for found in pattern.finditer(text):
        between = text[place : found.start()]
        depth += sum(between.count(sign) for sign in _OPENING) - sum(between.count(sign) for sign in _CLOSING)
        place = found.start()
        if depth == 0:
            parts.append(text[start : found.start()].strip())
            start = place = found.end()
    parts.append(text[start:].strip())
    return parts


_TEXT = re.compile(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_SPACE_THAT_SAYS_NOTHING = re.compile(r"(?<![a-zA-Z\d]) | (?![a-zA-Z\d])|(?<=[a-zA-Z]) (?=\d)|(?<=\d) (?=[a-zA-Z])")


def without_text(text: str) -> str:
    """What `\\text` holds, as it stands."""
    return _TEXT.sub(r" \1 ", text)


def key(text: str) -> str:
    """What two normal texts that say the same letter for letter have in common; words of two letters or more in small ones."""
    shown = _TEXT.sub(lambda found: f" {found[1].lower() if len(found[1].strip()) > 1 else found[1]} ", text)
    shown = _BLANK.sub(" ", shown).strip().rstrip(_END)
    return _SPACE_THAT_SAYS_NOTHING.sub("", shown).rstrip(_END) or text
