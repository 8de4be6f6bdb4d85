"""Options that only another one gives a meaning: set without it they would be ignored, and nobody would notice. Each is a
sentence with key, rule, values found and fix. What a loss, a learning rate or a source of prompts ignores is told where its
rules are.
"""

from __future__ import annotations

from pydantic import BaseModel

from engine.config.options import Options


def broken_unused_rules(c: Options) -> list[str]:
    """Sentences for options that nothing looks at in this run."""
    broken: list[str] = []
    if c.sync.sync_interval != "auto":
        broken += _without(
            "sync", c.sync, "auto_", "sync.sync_interval = 'auto', which decides by it", repr(c.sync.sync_interval)
        )
    if c.reward_model.path is None:
        broken += _without("reward_model", c.reward_model, "", "reward_model.path, the model that it is of", "none")
    functions = [name for source in c.data.sources for name in (*source.rewards, source.reward_combine) if ":" in name]
    if c.rewards.function is None and not functions and c.rewards.environment:
        broken.append(
            f"rewards.environment is what reward functions of your own may see; found {list(c.rewards.environment)} and no "
            f"such function: name one in data.reward, or remove it"
        )
    return broken


def _without(table: str, section: BaseModel, prefix: str, needed: str, found: str) -> list[str]:
    """A sentence for each option of a table, of those that begin with `prefix`, that is not as it is by default."""
    return [
        f"{table}.{name} needs {needed}; found {getattr(section, name)!r} with {found}: set that, or remove it (on a command "
        f"line as {table}.{name}=)"
        for name, field in type(section).model_fields.items()
        if name.startswith(prefix) and getattr(section, name) != field.default
    ]
