"""From a problem's text to a prompt's tokens: the user message of the paper and the tokenizer's own chat template. The
only place that tokenizes prompts; it knows nothing of files or order.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Figure 4 of arXiv 2506.21495. The paper prints typographic quotes, an effect of its typesetting; ours are plain ASCII.
FIGURE4 = (
    "Given the following problem, reason and give a final answer to the problem. Problem: {problem}\n"
    "Your response should end with 'The final answer is $\\boxed{[answer]}$. I hope it is correct.' "
    "where [answer] is the response to the problem."
)
FIGURE5 = "{problem}"  # the user's own words
NAMED = {"figure4": FIGURE4, "figure5": FIGURE5}
TEMPLATE_DATE = "26 Jul 2024"  # Llama's templates print a date, today's by default: a run would depend on its day


def load_tokenizer(path: str | Path, option: str = "model.path") -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face folder, never from the network. Raises ConfigError naming `option` and the folder."""
    from transformers import AutoTokenizer  # takes seconds

    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{option} must be a folder with a tokenizer; found no folder {path}: check the path")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the library has no type for a broken file
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{option} must hold a tokenizer (tokenizer.json and tokenizer_config.json, beside config.json); found that {path} "
            f"cannot be read ({why}): copy the model's files there again"
        ) from error
    return tokenizer


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: str, template: str) -> tuple[int, ...]:
    """Token ids of one user message in the chat template, generation prompt included.

    `template` is 'figure4', 'figure5' or a text whose every {problem} is replaced, literally. Raises ConfigError when the
    tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model.path must hold a tokenizer with a chat template; found none in {tokenizer.name_or_path!r}: "
            f"add chat_template to its tokenizer_config.json"
        )
    message = NAMED.get(template, template).replace("{problem}", problem)
    token_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        return_dict=False,
        date_string=TEMPLATE_DATE,
    )
    return tuple(token_ids)
