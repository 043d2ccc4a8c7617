"""What each task promises of its prompts, read back from the text by means that the generators do not share."""

from __future__ import annotations

import ast
import random
import re
import textwrap
from collections import Counter

import pytest

from workbench import registry
from workbench.models import LanguageModel
from workbench.prompts import Prompt, Task, sample
from workbench.tasks import colored_objects, ioi

TASKS = list(registry.tasks().values())
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def draws(name: str, n: int = 300, seed: int = 0) -> list[Prompt]:
    task, rng = registry.get_task(name), random.Random(seed)
    return [task.draw(rng) for _ in range(n)]


def changed(prompt: Prompt) -> list[tuple[str, str]]:
    """The words, in order, that differ between clean and corrupted."""
    clean, corrupted = (re.findall(r"\w+|\W", text) for text in (prompt.clean, prompt.corrupted))
    return [(a, b) for a, b in zip(clean, corrupted, strict=True) if a != b]


# ---- every task ----


@every_task
def test_the_generator_given_is_the_only_source_of_chance(task: Task) -> None:
    draws = []
    for seed, elsewhere in ((0, 1), (0, 2), (1, 1)):
        random.seed(elsewhere)
        rng = random.Random(seed)
        draws.append([task.draw(rng) for _ in range(30)])
    first, again, other = draws
    assert first == again
    assert first != other


@every_task
def test_there_are_prompts_enough(task: Task) -> None:
    rng = random.Random(0)
    assert len({task.draw(rng).clean for _ in range(500)}) >= 250


@every_task
def test_right_wrong_and_corrupted_differ(task: Task) -> None:
    rng = random.Random(0)
    for prompt in (task.draw(rng) for _ in range(200)):
        assert prompt.answers and prompt.wrong
        assert not set(prompt.answers) & set(prompt.wrong)
        assert prompt.clean != prompt.corrupted
        assert not prompt.clean.endswith(" ")  # it would be cut off the answer's token


@every_task
def test_prompts_pass_the_checks_under_a_tokenizer(task: Task, tiny: LanguageModel, coder: LanguageModel) -> None:
    model = coder if task.draw(random.Random(0)).whole else tiny
    batch, again, other = (sample(task, model, 16, seed) for seed in (0, 0, 1))
    assert batch.prompts == again.prompts
    assert batch.prompts != other.prompts
    assert len({prompt.clean for prompt in batch.prompts}) == 16


# ---- ioi ----


def names_in(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text) if word in ioi.NAMES]


@pytest.mark.parametrize(("n", "tokens"), [(3, None), (None, 40), (2, 1000), (None, 1)])
def test_parts_hold_no_more_than_asked_and_every_prompt_once(
    n: int | None, tokens: int | None, tiny: LanguageModel
) -> None:
    batch = sample(registry.get_task("ioi"), tiny, 24, seed=0)
    seen: list[int] = []
    for part, some in batch.parts(n, tokens=tokens):
        lengths = {len(x) for x in some.clean}
        (length,) = lengths
        most = min(n or 24, 24 if tokens is None else max(1, tokens // length))
        assert len(some) == len(part) <= most and some.prompts == tuple(batch.prompts[i] for i in part)
        full = sum(len(batch.clean[i]) == length for i in range(24))
        left = full - sum(len(batch.clean[i]) == length for i in seen)
        assert len(some) == min(most, left)  # no smaller than it need be
        seen += part.tolist()
    assert sorted(seen) == list(range(24))


def test_ioi_leaves_one_person_out_and_the_corrupted_prompt_none() -> None:
    for prompt in draws("ioi"):
        io, s = prompt.answers[0].strip(), prompt.wrong[0].strip()
        first, second, giver = names_in(prompt.clean)
        assert giver == s
        assert {first, second} == {io, s}
        people = names_in(prompt.corrupted)
        assert len(set(people)) == 3
        assert people[2] == s
        assert people[first == io] == io  # at the first mention of S
        assert len(changed(prompt)) == 2


def test_ioi_flip_asks_for_the_other_name() -> None:
    for prompt in draws("ioi_flip"):
        io, s = prompt.answers[0].strip(), prompt.wrong[0].strip()
        clean, corrupted = names_in(prompt.clean), names_in(prompt.corrupted)
        assert clean[:2] == corrupted[:2] and set(clean[:2]) == {io, s}
        assert (clean[2], corrupted[2]) == (s, io)


def test_ioi_uses_all_thirty_templates_evenly() -> None:
    forms: Counter[tuple[str, bool]] = Counter()
    for prompt in draws("ioi", 3000):
        first = names_in(prompt.clean)[0]
        forms[prompt.clean.split(first)[0], first == prompt.answers[0].strip()] += 1
    assert len(forms) == 30
    assert min(forms.values()) > 60  # 100 expected each
    assert 0.45 < sum(n for (_, abba), n in forms.items() if abba) / 3000 < 0.55


def test_ioi_keeps_a_name_within_a_name_whole() -> None:
    class Names(random.Random):
        def sample(self, *_: object, **__: object) -> list[str]:  # type: ignore[override]
            return ["Sara", "Sarah", "Anna"]

    prompt = ioi.ioi(Names(0))
    assert sorted(names_in(prompt.clean)) == ["Sara", "Sarah", "Sarah"]
    assert sorted(names_in(prompt.corrupted)) == ["Anna", "Sara", "Sarah"]


# ---- greater_than ----


def test_greater_than_parts_the_hundred_years_at_the_first() -> None:
    starts = set()
    for prompt in draws("greater_than", 2000):
        found = re.fullmatch(r"The \w+ lasted from the year (\d\d)(\d\d) to the year (\d\d)", prompt.clean)
        assert found
        century, start, again = found.groups()
        assert century == again
        assert sorted(prompt.answers + prompt.wrong) == [f"{year:02}" for year in range(100)]
        assert all(int(end) > int(start) for end in prompt.answers)
        assert all(int(end) <= int(start) for end in prompt.wrong)
        assert changed(prompt) == [(century + start, century + "01")]
        starts.add(int(start))
    assert starts == set(range(2, 99))


def test_greater_than_century_changes_the_first_century_alone() -> None:
    """Clean and corrupted prompts vary alike: the same years, and as many centuries."""
    first: dict[str, set[str]] = {"clean": set(), "corrupted": set()}
    for prompt in draws("greater_than_century", 2000):
        texts = {"clean": prompt.clean, "corrupted": prompt.corrupted}
        parts = {name: re.findall(r"(\d\d)(\d\d)|year (\d\d)$", text) for name, text in texts.items()}
        (start, year, _), (_, _, last) = parts["clean"]
        assert start == last and all(int(end) > int(year) for end in prompt.answers)
        assert parts["corrupted"] == [(str(int(start) - 1), year, ""), ("", "", last)]
        for name in first:
            first[name].add(parts[name][0][0])
    assert len(first["clean"]) == len(first["corrupted"]) == 8


# ---- docstring ----


def parameters(prompt: str, answer: str) -> tuple[list[str], list[str]]:
    """The signature and the documented names, as Python itself reads the completed method."""
    source = textwrap.dedent(f'{prompt}{answer}: word\n        """')
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    documented = re.findall(r":param (\w+):", ast.get_docstring(function) or "")
    return [argument.arg for argument in function.args.args], documented


def test_docstring_answer_continues_the_order_of_the_signature() -> None:
    for prompt in draws("docstring"):
        signature, documented = parameters(prompt.clean, prompt.answers[0])
        assert signature[0] == "self"
        assert len(set(signature)) == 7
        assert documented == signature[3:6]
        assert prompt.wrong[0].strip() == signature[6]


def test_docstring_corrupted_documents_no_parameter_of_the_signature() -> None:
    for prompt in draws("docstring"):
        signature, documented = parameters(prompt.corrupted, prompt.answers[0])
        assert not set(signature) & set(documented)
        assert len(changed(prompt)) == 5
        assert prompt.wrong[0].strip() in signature


# ---- induction ----


def test_induction_answer_followed_the_same_word_before() -> None:
    distances, lengths = set(), set()
    for prompt in draws("induction"):
        words = prompt.clean.split()
        before, last = (i for i, word in enumerate(words) if word == words[-1])
        assert f" {words[before + 1]}" == prompt.answers[0]
        assert Counter(words)[prompt.answers[0].strip()] == Counter(words)[prompt.wrong[0].strip()] == 1
        distances.add(last - before)
        lengths.add(len(words))
    assert len(distances) > 3
    assert len(lengths) == 1


def test_induction_corrupted_repeats_nothing() -> None:
    for prompt in draws("induction"):
        words = prompt.corrupted.split()
        assert len(set(words)) == len(words)
        assert not {prompt.answers[0].strip(), prompt.wrong[0].strip()} & set(words)
        assert words[-1] == prompt.clean.split()[-1]


# ---- colored_objects ----


def scenes(text: str) -> list[tuple[dict[str, str], str]]:
    """Of each question: the colour of each object, and the object asked about."""
    questions = re.findall(r"Q: (.+?\.) What color is the (\w+)\?\nA:", text)
    return [({thing: color for color, thing in re.findall(r"\ban? (\w+) (\w+)", s)}, asked) for s, asked in questions]


def test_colored_objects_answers_are_the_colours_of_the_objects_asked_about() -> None:
    places: Counter[int] = Counter()
    for prompt in draws("colored_objects", 900):
        (shown, shown_asked), (test, asked) = scenes(prompt.clean)
        _, (same, instead) = scenes(prompt.corrupted)
        assert f"A: {shown[shown_asked]}\n" in prompt.clean
        assert prompt.answers == (f" {test[asked]}",)
        assert prompt.wrong == (f" {test[instead]}",)
        assert same == test
        assert changed(prompt) == [(asked, instead)]
        places[list(test).index(asked)] += 1
    assert all(240 < places[i] < 360 for i in range(3))


def test_colored_objects_example_gives_nothing_away() -> None:
    for prompt in draws("colored_objects"):
        (shown, _), (test, _) = scenes(prompt.clean)
        assert len(shown) == len(test) == 3
        assert not set(shown) & set(test)
        assert len({*shown.values(), *test.values()}) == 6
        assert {*shown.values(), *test.values()} <= set(colored_objects.COLORS)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt.clean)
