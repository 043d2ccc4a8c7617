"""Generated programs and the binary tasks on them, held to Python's own parser and to rules written down apart."""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from circuits.sparse import data, tokenizer
from workbench import registry
from workbench.errors import UserError
from workbench.models import LanguageModel
from workbench.prompts import Prompt, Task, nonsense, sample, split
from workbench.tasks.python_code import TASKS, pair_loss, program

# What decides each class, read off the prompt by hand: (pattern, answer); "not X" is anything else.
RULES: dict[str, list[tuple[str, str]]] = {
    "single_double_quote": [(r'\("[^"\']+$', '")'), (r"\('[^\"']+$", "')")],
    "final_kwarg": [(r"def \w+\((\w+=None, )+\w+$", "=None"), (r"def \w+\((\w+, )+\w+$", "):")],
    "set_or_string": [
        (r"(?s)\b(\w+) = set\(\)\n.*\n    \1$", ".add"),
        (r"(?s)\b(\w+) = (?:\"\"|'')\n.*\n    \1$", " +="),
    ],
    "set_or_string_fixedvarname": [
        (r"(?s)\bcurrent = set\(\)\n.*\n    current$", ".add"),
        (r"(?s)\bcurrent = (?:\"\"|'')\n.*\n    current$", " +="),
    ],
    "class_init": [(r"(?s)def __init__\(.*self\.(\w+) =$", r" \1")],
    "with_as": [(r"with open\(\w+\)$", " as"), (r"\w+ = open\(\w+\)$", "\n")],
    "bracket_brace": [(r"\{'.*, '\w+$|\{\".*, \"\w+$", ":"), (r"\['.*, '\w+$|\[\".*, \"\w+$", ",")],
    "with_open": [(r"open\(input_\w+, '$", "r"), (r"open\(output_\w+, '$", "w")],
    "bracket_counting": [(r" \[\d+(, \d+)*$", "]"), (r" \[\[\d+(, \d+)*$", "]]")],
    "for_while": [(r"for \w+$", " in"), (r"while \w+$", ":")],
    "else_elif": [(r"\nelse$", ":"), (r"\nelif$", "not :")],
    "fstring_brace": [(r"\(f[\"'][a-z ]+$", " {"), (r"\([\"'][a-z ]+$", "not  {")],
    "if_ternary": [(r"(?:^|\n)if \w+ == \w+$", ":"), (r"\w+ = \d+ if \w+ == \w+$", "not :")],
    "var_swap": [(r"\b(\w+), (\w+) = \2,$", r" \1")],
    "indent_for": [(r"    for \w+ in \w+:\n$", " " * 7), (r"\n    \w+ = .+\n$", " " * 3)],
    "lambda_func": [(r"\w+ = lambda \w+$", ":"), (r"(?:^|\n)def \w+$", "(")],
    "if_equals": [(r"    if \w+$", " =="), (r"\n    \w+$", " =")],
    "enumerate_range": [(r"for \w+, \w+ in$", " enumerate"), (r"for \w+ in$", " range")],
    "var_if": [(r"(?:^|\n)if \w+ == True$", ":"), (r"(?:^|\n)\w+ = True$", "\n")],
    "while_return_true": [(r"    while True$", ":"), (r"    return True$", "\n")],
}
# Two prompts of each task written by hand after the paper's table, one per class, and what continues them.
GRAPH = "for neighbor, cost in graph[node].items():\n    if neighbor not in seen:\n        push(cost)\n    "
EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "single_double_quote": [
        ('print("There is no topological sort', '")'),
        ("print('There is no topological sort", "')"),
    ],
    "final_kwarg": [("def f(a=None, b=None, c", "=None"), ("def f(a, b, c", "):")],
    "set_or_string": [(f"v = set()\n{GRAPH}v", ".add"), (f'v = ""\n{GRAPH}v', " +=")],
    "set_or_string_fixedvarname": [
        (f"current = set()\n{GRAPH}current", ".add"),
        (f'current = ""\n{GRAPH}current', " +="),
    ],
    "class_init": [
        ("class A:\n    def __init__(self, width, size):\n        self.width =", " width"),
        ("class A:\n    def __init__(self, width, size):\n        self.size =", " size"),
    ],
    "with_as": [("with open(f)", " as"), ("h = open(f)", "\n")],
    "bracket_brace": [("x = {'a': 1, 'b", ":"), ("x = ['a', 1, 'b", ",")],
    "with_open": [("with open(input_file, '", "r"), ("with open(output_file, '", "w")],
    "bracket_counting": [("values = [5, 3, 11", "]"), ("values = [[5, 3, 11", "]]")],
    "for_while": [("for x", " in"), ("while x", ":")],
    "else_elif": [("if a == b:\n    c = 1\nelse", ":"), ("if a == b:\n    c = 1\nelif", " a")],
    "fstring_brace": [('print(f"total', " {"), ('print("total', " count")],
    "if_ternary": [("if a == b", ":"), ("x = 1 if a == b", " else")],
    "var_swap": [("x, y = y,", " x"), ("v, w = w,", " v")],
    "indent_for": [("def f(xs):\n    for i in xs:\n", " " * 7), ("def f(xs):\n    i = xs\n", " " * 3)],
    "lambda_func": [("f = lambda x", ":"), ("def x", "(")],
    "if_equals": [("while y:\n    if x", " =="), ("while y:\n    x", " =")],
    "enumerate_range": [("for i, x in", " enumerate"), ("for i in", " range")],
    "var_if": [("if x == True", ":"), ("x = True", "\n")],
    "while_return_true": [("def f(x):\n    while True", ":"), ("def f(x):\n    return True", "\n")],
}
# What is replaced, so that the two prompts of a pair, comments aside, are the same text.
DECIDES: dict[str, tuple[str, str]] = {
    "single_double_quote": (r"[\"'](?=[^\"']+$)", ""),
    "final_kwarg": (r"=None(?=.*$)", ""),
    "set_or_string": (r"= (set\(\)|\"\"|'')\n(?=for|while)", ""),
    "set_or_string_fixedvarname": (r"= (set\(\)|\"\"|'')\n(?=for|while)", ""),
    "class_init": (r"\w+ =$", ""),
    "with_as": (r"(with|\w+ =) (?=open\(\w+\)$)", ""),
    "bracket_brace": (r"[\[{](?=.*$)|(?<=[\"'])[:,](?= \d)(?=.*$)", ""),
    "with_open": (r"(in|out)put(?=\w+, '$)", ""),
    "bracket_counting": (r"\[+(?=[\d, ]+$)", ""),
    "for_while": (r"\w+(?= \w+$)", ""),
    "else_elif": (r"\w+$", ""),
    "fstring_brace": (r"\(f?(?=[\"'][a-z ]+$)", ""),
    "if_ternary": (r"\w+ = \d+ (?=if \w+ == \w+$)", ""),
    "var_swap": (r".*$", ""),
    "indent_for": (r".*\n$", ""),
    "lambda_func": (r"(\w+ = lambda|def)(?= \w+$)", ""),
    "if_equals": (r"if (?=\w+$)", ""),
    "enumerate_range": (r", \w+(?= in$)", ""),
    "var_if": (r"if (?=\w+ ==? True$)|==?(?= True$)", ""),
    "while_return_true": (r"\w+(?= True$)", ""),
}
every_task = pytest.mark.parametrize("name", TASKS)


def draws(name: str, n: int = 200, seed: int = 0) -> list[Prompt]:
    task, rng = registry.get_task(name), random.Random(seed)
    return [task.draw(rng) for _ in range(n)]


def texts(prompt: Prompt) -> Iterator[tuple[str, str]]:
    """Both prompts of a pair, each with the rest of its line."""
    return zip((prompt.clean, prompt.corrupted), (prompt.answers[0], prompt.wrong[0]), strict=True)


def decide(name: str, prompt: str) -> tuple[int, str]:
    """The class of a prompt and its answer, by the rules above. Exactly one of them applies."""
    found = [(i, match, answer) for i, (rule, answer) in enumerate(RULES[name]) if (match := re.search(rule, prompt))]
    assert len(found) == 1, (name, prompt)
    i, match, answer = found[0]
    return i, match.expand(answer) if "\\" in answer else answer


def agrees(answer: str, expected: str) -> bool:
    if expected.startswith("not "):
        return not answer.startswith(expected.removeprefix("not "))
    return answer == expected or answer.strip("\"'") == expected  # a quote may be part of the token


def reader(of: Tokenizer) -> LanguageModel:
    """A random model that reads with a tokenizer."""
    config = GPT2Config(
        vocab_size=of.get_vocab_size(), n_embd=16, n_layer=1, n_head=2, n_positions=512, bos_token_id=0, eos_token_id=0
    )
    module = AutoModelForCausalLM.from_config(config)
    return LanguageModel(module, PreTrainedTokenizerFast(tokenizer_object=of), name="reader", fingerprint="reader")


# ---- programs ----


def test_every_program_compiles_and_hardly_any_comes_twice() -> None:
    rng = random.Random(0)
    programs = [program(rng) for _ in range(2000)]
    for text in programs:
        ast.parse(text)
    assert len(set(programs)) > 1900
    again = random.Random(0)
    assert [program(again) for _ in range(50)] == programs[:50]


def test_names_are_used_as_they_were_bound() -> None:
    uses = 0
    for text in islice(data.programs(0), 1500):
        for use in re.finditer(r"^ *(\w+)(\.add\(|\.append\(| \+= ([\d\"']))", text, re.M):
            empty = {".add(": r"set\(\)", ".append(": r"\[\]"}.get(
                use[2], r"[01]" if use[3] and use[3].isdigit() else r"\"\"|''"
            )
            assert re.search(rf"\b{use[1]} = ({empty})$", text[: use.start()], re.M), text
            uses += 1
        for name, mode in re.findall(r"open\((in|out)put_\w+, ['\"](\w)", text):
            assert (name, mode) in (("in", "r"), ("out", "w"))
    assert uses > 500


def test_classes_keep_arguments_under_their_names_and_swaps_swap() -> None:
    kept = swaps = 0
    for text in islice(data.programs(1), 1000):
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Assign):
                continue
            (target,) = node.targets
            if isinstance(target, ast.Attribute):
                assert isinstance(node.value, ast.Name) and node.value.id == target.attr
                kept += 1
            if isinstance(target, ast.Tuple):
                assert isinstance(node.value, ast.Tuple)
                assert [ast.unparse(x) for x in target.elts] == [ast.unparse(x) for x in reversed(node.value.elts)]
                swaps += 1
    assert kept > 300 and swaps > 300


@every_task
def test_programs_hold_both_classes_of_every_task(name: str) -> None:
    """Prompts that the rules of the task recognise, each followed by its answer: at least 20 in 1000 programs."""
    text = "\n".join(islice(data.programs(2), 1000))
    expected: list[tuple[str, str]] = []
    for rule, answer in RULES[name]:
        if name in ("set_or_string", "set_or_string_fixedvarname"):
            expected.append((r"\n +\w+", answer))
        else:
            expected.append(
                (rule.replace("(?s)", "").replace(".*self", "self").removeprefix(r"def __init__\("), answer)
            )
    for rule, answer in expected:
        rule = "|".join(part.removesuffix("$") for part in rule.split("$|"))
        negated = answer.startswith("not ")
        answer = re.escape(answer.removeprefix("not ")).replace(r"\\1", r"\1")
        if name == "bracket_brace":
            answer = "['\"]" + answer
        if name == "indent_for":
            answer += r" \S"
        found = re.findall(rf"(?:{rule}){f'(?!{answer})' if negated else answer}", text)
        assert len(found) >= 20, (rule, answer, len(found))


# ---- pairs ----


@every_task
def test_the_rules_know_the_papers_examples(name: str) -> None:
    for i, (prompt, answer) in enumerate(EXAMPLES[name]):
        which, expected = decide(name, prompt)
        assert agrees(answer, expected)
        assert which == i or len(RULES[name]) == 1


@every_task
def test_answers_are_those_of_the_rules(name: str, coder: LanguageModel) -> None:
    batch = sample(registry.get_task(name), coder, 64, 0)
    assert batch.drawn < 200
    for i, prompt in enumerate(batch.prompts):
        classes = set()
        for text, ids in ((prompt.clean, batch.answers[i]), (prompt.corrupted, batch.wrong[i])):
            (answer,) = coder.token_strings(ids.tolist())
            which, expected = decide(name, text)
            assert agrees(answer, expected), (text, answer, expected)
            classes.add((which, answer))
        assert len(classes) == 2


@every_task
def test_a_pair_differs_only_in_what_decides(name: str) -> None:
    pattern, instead = DECIDES[name]
    for prompt in draws(name):
        bare = [re.sub(r"^#.*\n", "", text, flags=re.M) for text in (prompt.clean, prompt.corrupted)]
        assert bare[0] != bare[1]
        assert re.sub(pattern, instead, bare[0]) == re.sub(pattern, instead, bare[1])
        notes = [re.findall(r"^#(.*)\n", text, re.M) for text in (prompt.clean, prompt.corrupted)]
        for one, other in zip(*notes, strict=True):
            assert one.startswith(other) or other.startswith(one)


@every_task
def test_lines_with_their_rest_compile(name: str) -> None:
    for prompt in draws(name):
        for text, rest in texts(prompt):
            last = (text + rest).rstrip("\n").split("\n")[-1]
            inner = f"{' ' * (len(last) - len(last.lstrip()) + 4)}pass\n" if last.endswith(":") else ""
            ast.parse(text + rest + inner)


@every_task
def test_prompts_are_whole_tokens_of_their_text(name: str, coder: LanguageModel) -> None:
    """Prompt and answer are the beginning of the line as the tokenizer writes it, and both classes end alike."""
    batch = sample(registry.get_task(name), coder, 64, 1)
    for i, prompt in enumerate(batch.prompts):
        sides = ((batch.clean[i], batch.answers[i]), (batch.corrupted[i], batch.wrong[i]))
        for (tokens, answer), (text, rest) in zip(sides, texts(prompt), strict=True):
            whole = coder.tokenize(text + rest)
            assert len(answer) == 1
            assert torch.equal(torch.cat([tokens, answer]), whole[: len(tokens) + 1])
            assert "".join(coder.token_strings(tokens[1:].tolist())) == text  # under this tokenizer, cut where it says
        assert len(batch.clean[i]) == len(batch.corrupted[i])
        assert (batch.clean[i][-1] == batch.corrupted[i][-1]) == (name != "else_elif")


@every_task
def test_classes_are_balanced_and_the_comment_does_not_tell(name: str) -> None:
    both: tuple[list[int], list[int]] = ([], [])
    clean = 0
    for prompt in draws(name, 600):
        answers = [rest for _, rest in texts(prompt)]
        if len(RULES[name]) == 2:
            which = [decide(name, text)[0] for text, _ in texts(prompt)]
            assert sorted(which) == [0, 1]
            clean += which[0] == 0
            for text, i in zip((prompt.clean, prompt.corrupted), which, strict=True):
                both[i].append(len((re.findall(r"^#.*\n", text, re.M) or [""])[-1].split()))
        else:
            clean += answers[0] < answers[1]
    assert 250 < clean < 350
    if both[0]:  # the best guess from the number of words
        best = max(abs(sum(n <= at for n in both[0]) - sum(n <= at for n in both[1])) for at in range(20))
        assert 0.5 + best / 1200 < 0.74


# ---- parts and controls ----


@every_task
def test_no_test_text_is_a_training_text(name: str) -> None:
    task = registry.get_task(name)
    seen: dict[str, set[str]] = {}
    for which, n in (("train", 300), ("test", 100)):
        part, rng = split(task, which), random.Random(7)
        found = [part.draw(rng) for _ in range(n)]
        seen[which] = {text for prompt in found for text in (prompt.clean, prompt.corrupted)}
    assert not seen["train"] & seen["test"]
    assert len(seen["test"]) > 90
    assert {text for prompt in draws(name, 100) for text in (prompt.clean, prompt.corrupted)} - seen["test"]


def test_nonsense_labels_are_a_coin() -> None:
    task = registry.get_task("bracket_counting")
    control, rng, again = nonsense(task), random.Random(0), random.Random(0)
    drawn = [control.draw(rng) for _ in range(1000)]
    assert drawn[:20] == [control.draw(again) for _ in range(20)]
    true = [agrees(prompt.answers[0].strip(), decide(task.name, prompt.clean)[1]) for prompt in drawn]
    assert 440 < sum(true) < 560
    for i in (0, 1):  # of either class
        of_class = [kept for kept, prompt in zip(true, drawn, strict=True) if decide(task.name, prompt.clean)[0] == i]
        assert 0.42 < sum(of_class) / len(of_class) < 0.58


def test_nonsense_has_the_same_texts_and_both_answers(coder: LanguageModel) -> None:
    batch = sample(nonsense(registry.get_task("with_as")), coder, 64, 0)
    answers = {
        tuple(coder.token_strings(torch.cat([a, w]).tolist())) for a, w in zip(batch.answers, batch.wrong, strict=True)
    }
    assert answers == {(" as", "\n"), ("\n", " as")}
    ends = {prompt.clean.split("\n")[-1].split()[0] == "with": 0 for prompt in batch.prompts}
    assert set(ends) == {True, False}


# ---- the loss ----


def test_pair_loss_is_the_mean_of_both_sides(coder: LanguageModel) -> None:
    batch = sample(registry.get_task("bracket_counting"), coder, 8, 0)
    clean = torch.zeros(8, 512)
    torch.testing.assert_close(pair_loss(batch, clean, clean), torch.full((8,), math.log(2)))
    for row, answer in enumerate(batch.answers):
        clean[row, answer] = 3.0
    # The same prediction on both sides is right once and wrong once.
    sides = [math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))]
    torch.testing.assert_close(pair_loss(batch, clean, clean), torch.full((8,), sum(sides) / 2))


def test_pair_loss_of_anything_else(coder: LanguageModel) -> None:
    """One token against the whole vocabulary: -log p on its side, -log(1 - p) on the other."""
    batch = sample(registry.get_task("else_elif"), coder, 16, 0)
    (colon,) = coder.token_ids("x:")[1:]
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (torch.randn(16, 512, generator=generator) for _ in range(2))
    for i, loss in enumerate(pair_loss(batch, clean, corrupted)):
        first, second = (clean, corrupted) if batch.prompts[i].clean.endswith("else") else (corrupted, clean)
        p, q = (float(side[i].softmax(-1)[colon]) for side in (first, second))
        assert float(loss) == pytest.approx(-(math.log(p) + math.log(1 - q)) / 2, rel=1e-4)


# ---- other tokenizers ----


def test_every_task_can_be_asked_under_the_tokenizer_of_a_mixed_stream() -> None:
    model = reader(data.train_tokenizer(1024, real=0.5, size=1_000_000))
    for name in TASKS:
        assert sample(registry.get_task(name), model, 8, 0).drawn < 30


def test_answers_that_merge_with_the_end_of_the_prompt_take_it_along() -> None:
    """A tokenizer in which a bracket and the end of its line are one token."""
    merging = data.train_tokenizer(300, real=0.0, size=1000)
    pieces = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\d+| ?[^\s\p{L}\d]+\n*|\s+"), "isolated")
    merging.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    merging.train_from_iterator(islice(data.programs(0), 2000))
    model = reader(merging)
    batch = sample(registry.get_task("with_as"), model, 16, 0)
    for clean, answer, wrong in zip(batch.clean, batch.answers, batch.wrong, strict=True):
        assert set(model.token_strings([*answer.tolist(), *wrong.tolist()])) == {")", ")\n"}
        assert not model.token_strings(clean.tolist())[-1].endswith(")")


def test_shared_beginnings_of_answers_join_the_prompt() -> None:
    """Bytes as tokens: the space before a name is common to both answers of class_init."""
    model = reader(tokenizer.train([], tokenizer.SMALLEST))
    batch = sample(registry.get_task("class_init"), model, 16, 0)
    for prompt, clean, answer in zip(batch.prompts, batch.clean, batch.answers, strict=True):
        assert prompt.clean.endswith(" =")
        read = "".join(model.token_strings(torch.cat([clean, answer])[1:].tolist()))
        assert re.search(r"self\.(\w+)\w* = \1$", read)


def test_pairs_without_single_token_answers_are_refused_with_a_sentence(coder: LanguageModel) -> None:
    def constant(prompt: Prompt) -> Task:
        return Task("constant", 1, "logit_diff", lambda rng: prompt, "")

    beginning = Prompt("f(x", "g(x", (")",), (")\n",), whole=True)
    with pytest.raises(UserError, match="the rest of one line is the beginning of the other's"):
        sample(constant(beginning), coder, 1, 0)
    unequal = Prompt("if x", "x", (" == 1\n",), (" = 1\n",), whole=True)
    with pytest.raises(UserError, match=r"only 0 of 1 constant prompts pass.*different numbers of tokens"):
        sample(constant(unequal), coder, 1, 0)
