"""Several sources in one batch: exact numbers of each in every step, each in its own order; spare prompts that fill the places
of those without signal; and the files that all of it is read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config.load import RunConfig
from engine.config.options import Source
from engine.core.errors import DataError
from engine.data.mixture import Mixture, load_held_out, load_mixture
from engine.data.prompts import PromptOrder, PromptSet
from engine.data.rows import load_rows
from engine.data.templates import encode_prompt
from engine.inference.pool import Pool
from engine.rewards.registry import judging_of
from engine.rollouts.batch import batch_groups, training_sequences
from engine.rollouts.source import RolloutSource
from tests.rollouts import make_prompt
from tests.unit.inference.test_pool import FakeEngine
from tests.unit.rollouts.test_rollouts import Parity, group, run_config

SIZES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=4)


def prompt_set(name: str, size: int) -> PromptSet:
    return PromptSet(tuple(make_prompt(f"{name}{i}", (i + 1,), f"{name} {i}", "1", "", "") for i in range(size)), 0, 0)


def mixture(sizes: list[tuple[int, int, int]], seed: int) -> Mixture:
    """Sources named s0, s1, ... of (prompts, prompts a step, spare prompts)."""
    sources = tuple(Source(train="unused", prompts_per_step=n, spare_prompts=spare) for _, n, spare in sizes)
    return Mixture(sources, tuple(prompt_set(f"s{place}:", size) for place, (size, _, _) in enumerate(sizes)), seed)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(0, 2**40), st.integers(0, 50))
def test_every_step_holds_the_exact_numbers_source_by_source(sizes, seed, step):
    made = mixture(sizes, seed)
    names = [prompt.id.split(":")[0] for prompt in made.at(step)]
    assert names == [f"s{place}" for place, (_, n, spare) in enumerate(sizes) for _ in range(n + spare)]
    assert made.prompts_per_step == sum(n for _, n, _ in sizes)
    assert made.at(step) == made.at(step), "a function of the step"


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(0, 2**40))
def test_every_epoch_of_a_source_visits_each_of_its_prompts_once(sizes, seed):
    made = mixture(sizes, seed)
    for place, (size, n, spare) in enumerate(sizes):
        steps = -(-2 * size // (n + spare))
        seen = [p.id for step in range(steps) for p in made.at(step) if p.id.startswith(f"s{place}:")]
        wanted = sorted(prompt.id for prompt in made.sets[place].prompts)
        assert sorted(seen[:size]) == sorted(seen[size : 2 * size]) == wanted


def test_one_source_has_the_order_it_had_alone_and_others_have_their_own():
    sizes = [(20, 5, 0), (20, 5, 0), (20, 5, 0)]
    made, alone = mixture(sizes, 3), prompt_set("s0:", 20).prompts
    orders = [[int(p.id.split(":")[1]) for step in range(4) for p in made.at(step)[5 * i : 5 * i + 5]] for i in range(3)]
    assert orders[0] == PromptOrder(20, 3).at(0, 20)
    assert [alone[i] for i in PromptOrder(20, 3).at(2, 5)] == mixture(sizes[:1], 3).at(2)
    assert len(set(map(tuple, orders))) == 3
    assert made.at(1)[5:10] == mixture(sizes[:2], 3).at(1)[5:], "a further source changes no other's order"
    assert orders[1][:5] == PINNED  # a change here changes every run with several sources


PINNED = [19, 1, 0, 6, 8]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_batch_is_the_first_with_signal_of_each_source(data):
    """Against the definition, place by place: with signal in order, then those without until the batch is full."""
    shares, signals = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        places, spare = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
        shares.append((places + spare, places))
        signals += data.draw(st.lists(st.booleans(), min_size=places + spare, max_size=places + spare))
    config = run_config()
    groups = [group([1, 0] if signal else [0, 0], i % 9) for i, signal in enumerate(signals)]
    batch, used, unused = batch_groups(groups, shares, config)
    start, wanted = 0, []
    for sampled, places in shares:
        own = list(range(start, start + sampled))
        best_first = [i for i in own if signals[i]] + [i for i in own if not signals[i]]
        wanted += sorted(best_first[:places])
        start += sampled
    assert [id(g) for g in batch] == [id(groups[i]) for i in wanted]
    firsts = [i for start, (sampled, places) in zip(starts(shares), shares, strict=True) for i in range(start, start + places)]
    assert used == len(set(wanted) - set(firsts))
    assert unused == sum(signals) - sum(signals[i] for i in wanted)
    _, counts = training_sequences(batch, config)
    assert counts["skipped_prompts"] == sum(not signals[i] for i in wanted)


def starts(shares: list[tuple[int, int]]) -> list[int]:
    return [sum(sampled for sampled, _ in shares[:place]) for place in range(len(shares))]


def test_spare_prompts_are_sampled_counted_and_pass_in_the_order():
    """9 prompts, 3 a step and 3 to spare: the order advances by 6 a step."""
    config = run_config(data={"prompts_per_step": 3, "spare_prompts": 3}, algorithm={"samples_per_prompt": 2})
    prompts = Mixture(config.data.sources, (prompt_set("p", 9),), config.run.seed)
    engine = FakeEngine()
    source = RolloutSource(config, prompts, Pool([engine], 5.0), Parity(), None)
    source.open(range(0, 2))
    asked = [request.prompt_id for method, (requests, _) in engine.calls[:1] for request in requests]
    assert asked[::2] == [f"p{i}" for step in range(2) for i in PromptOrder(9, 3).at(step, 6)]
    for step in (0, 1):
        data = source.next(step)
        assert data.num_prompts == 3
        with_signal = len({s.group for s in data.sequences})
        assert with_signal == 3 - data.metrics["skipped_prompts"]
        assert {"spare_prompts_used", "unused_prompts"} <= data.metrics.keys()
    source.close()


# -- from files


def write(folder: Path, name: str, *records: dict[str, Any]) -> str:
    (folder / name).write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(folder / name)


MATHS = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+2?", "answer": "3", "id": "own"}]
CHAT: list[dict[str, Any]] = [
    {"conversation": [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi"}, {"role": "user"}], "turn": 2},
    {"problem": "1+1?", "country": "x"},
    {"prompt": "Sing."},
]


def config_of(folder: Path, **data: Any) -> RunConfig:
    judged = any(source.get("reward") == "model" for source in data.get("mix", ()))
    tree = run_config().model_dump() | {"model": {"path": str(folder)}, "reward_model": {"path": "m" if judged else None}}
    return RunConfig.model_validate(tree | {"data": data | {"max_prompt_tokens": 400}})


def test_sources_keep_their_templates_rewards_and_evaluation_sets(model_folder, tiny_tokenizer):
    chat = {"train": write(model_folder, "chat.jsonl", *CHAT), "reward": "model", "template": "figure5", "prompts_per_step": 1}
    chat |= {"held_out": write(model_folder, "held.jsonl", {"prompt": "Well?"})}
    config = config_of(model_folder, train=write(model_folder, "math.jsonl", *MATHS), prompts_per_step=3, mix=(chat,))
    made = load_mixture(config, judging_of, tiny_tokenizer)
    maths, others = (part.prompts for part in made.sets)
    assert [(p.problem, p.reward, p.answer) for p in maths] == [("1+1?", "math", "2"), ("1+2?", "math", "3")]
    assert [(p.problem, p.reward, p.answer) for p in others] == [("Hi", "model", ""), ("Sing.", "model", "")]
    assert (made.sets[1].num_duplicates, made.prompts_per_step) == (1, 4), "a problem of an earlier source is left out"
    assert tuple(maths[1].token_ids) == encode_prompt(tiny_tokenizer, "1+2?", "figure4")
    assert others[0].messages == (("system", "s"), ("user", "Hi")), "its own system message is kept"
    alone = encode_prompt(tiny_tokenizer, "Hi", "{problem}")
    system = tiny_tokenizer.encode("<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>", add_special_tokens=False)
    assert tuple(others[0].token_ids) == (alone[0], *system, *alone[1:])
    assert str(made).startswith("data.train: 2 prompts; ") and "data.mix[0].train: 2 prompts; " in str(made)
    (held_out,) = load_held_out(config, judging_of, tiny_tokenizer)
    assert (held_out.place, held_out.key, held_out.source.reward) == (1, "data.mix[0].held_out", "model")
    assert [(p.problem, p.reward) for p in held_out.prompts.prompts] == [("Well?", "model")]


def test_one_id_may_not_stand_for_two_problems_of_different_sources(model_folder, tiny_tokenizer):
    clash = {"train": write(model_folder, "b.jsonl", {"problem": "4+4?", "answer": "8", "id": "own"})}
    with pytest.raises(DataError, match=r"`id` must name one problem; found 'own' for '1\+2\?' and '4\+4\?'"):
        load_mixture(
            config_of(model_folder, train=write(model_folder, "a.jsonl", *MATHS), mix=(clash,)), judging_of, tiny_tokenizer
        )
    again = {"train": write(model_folder, "b.jsonl", *MATHS)}
    config = config_of(model_folder, train=write(model_folder, "a.jsonl", *MATHS), mix=(again,))
    with pytest.raises(DataError, match="found 0 longer than 400, 2 that came before and no other"):
        load_mixture(config, judging_of, tiny_tokenizer)


def test_what_is_wrong_with_a_file_begins_with_its_option_and_name(model_folder, tiny_tokenizer):
    good, bad = write(model_folder, "a.jsonl", *MATHS), write(model_folder, "b.jsonl", {"problem": "4+4?"})
    long = write(model_folder, "c.jsonl", {"problem": "5" * 5000, "answer": "8"})
    again = write(model_folder, "d.jsonl", *MATHS)

    def said(load: Any, **data: Any) -> str:
        with pytest.raises(DataError) as caught:
            load(config_of(model_folder, **data), judging_of, tiny_tokenizer)
        return str(caught.value)

    wrong = said(load_mixture, train=good, mix=({"train": bad},))
    assert wrong.startswith(f"data.mix[0].train ({bad}), line 1: a row needs `answer` or `solution`")
    wrong = said(load_mixture, train=good, mix=({"train": again},))
    assert wrong.startswith(f"data.mix[0].train ({again}): at least one prompt must fit data.max_prompt_tokens")
    wrong = said(load_held_out, train=good, held_out=long)
    bound = "inference.max_model_tokens - sampling.max_tokens"
    assert wrong.startswith(f"data.held_out ({long}): at least one prompt must fit {bound}; found 1 longer than 4088")
    beside = f"{Path(bad).parent}/./b.jsonl"
    wrong = said(load_held_out, train=good, mix=({"train": good, "held_out": beside},))
    assert wrong.startswith(f"data.mix[0].held_out ({beside}): {bad}, line 1: a row needs")


def test_a_row_needs_an_answer_where_its_reward_does(tmp_path):
    path = write(tmp_path, "chat.jsonl", *CHAT)
    assert [row.problem for row in load_rows(path, needs_answer=False)] == ["Hi", "1+1?", "Sing."]
    solutions = (r"so \boxed{5}", "so 5", r"\boxed{ }")
    solved = write(tmp_path, "solved.jsonl", *({"problem": "p", "solution": text} for text in solutions))
    assert [row.answer for row in load_rows(solved, needs_answer=False)] == ["5", "", ""], "the last box, where there is one"
    with pytest.raises(DataError, match="line 1: a row needs `answer` or `solution`"):
        load_rows(path)
    for turns in ([], "hello", [{"role": "assistant", "content": "a"}], [{"role": "user", "content": None}], [3]):
        with pytest.raises(DataError, match="line 1: `problem` must be a text that is not empty"):
            load_rows(write(tmp_path, "bad.jsonl", {"conversation": turns}), needs_answer=False)
