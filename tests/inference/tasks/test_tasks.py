"""Haystacks hold what their questions ask for, where they say, and fill a context; answers are scored."""

import json
from random import Random

import pytest

from megatron_attn2d.errors import UsageError
from megatron_attn2d.inference.tasks import catalogue, question_answering
from megatron_attn2d.inference.tasks.counting import CommonWords, FrequentWords
from megatron_attn2d.inference.tasks.filler import NOISE, Text, distinct, split_sentences
from megatron_attn2d.inference.tasks.haystack import Question, fit, spread
from megatron_attn2d.inference.tasks.needle import Needles
from megatron_attn2d.inference.tasks.question_answering import DocumentQuestions, Known
from megatron_attn2d.inference.tasks.tracking import VariableTracking

TEXT = Text([f"Sentence {number} of a book says nothing." for number in range(300)])
FEW = DocumentQuestions([Known("Who?", ("Ann",), ("Ann did it.",))])
SHORT = CommonWords(common=3, often=5, seldom=2)  # RULER's own takes thousands of tokens at the least


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("qa") / "questions.jsonl"
    lines = [
        {"question": f"Who built bridge {n}?", "answers": [f"Ann {n}"], "documents": [f"Bridge {n}: Ann {n} built it."]}
        for n in range(400)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("context", [1500, 9000])
@pytest.mark.parametrize("name", catalogue.RULER)
def test_a_haystack_fills_the_context_and_holds_its_answers(name, context, questions):
    task = SHORT if name == "cwe" else catalogue.ruler(name, TEXT, questions)
    made = fit(task, context, len, f"{name}/0", lambda question: len(question.solution))
    used = len(made.text) + max(len(question.text) + len(question.solution) for question in made.questions)
    assert used <= context
    assert used > context - context // 256 - 100  # 100: the longest unit of any task
    for question in made.questions:
        assert all(answer in made.text for answer in question.answers)
        assert question.score(question.solution.upper()) == 1
        assert question.score("I don't know.") == 0
    assert made == fit(task, context, len, f"{name}/0", lambda question: len(question.solution))
    assert made != fit(task, context, len, f"{name}/1", lambda question: len(question.solution))


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_a_needle_is_where_it_is_asked_to_be(depth):
    for size in (0, 8, 200):
        made = Needles("needle", NOISE, depth=depth).haystack(size, Random("1"))
        text = made.text.split("\n")[1]
        before, needle, after = text.partition(f"The secret number of {made.questions[0].text.split()[-2]}")
        assert needle
        assert before.count(".") == round(depth * size)
        assert after.count(".") == size - round(depth * size) + 1
        assert made.questions[0].depth == depth
        assert made.questions[0].answers == Needles("needle", TEXT).haystack(9, Random("1")).questions[0].answers


@pytest.mark.parametrize(
    ("name", "asked", "answers"),
    [
        ("niah_single_1", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multikey_2", 1, 1),
        ("niah_multivalue", 1, 4),
        ("niah_multiquery", 1, 4),
    ],
)
def test_how_many_needles_are_asked_for(name, asked, answers):
    made = catalogue.ruler(name, TEXT, None).haystack(50, Random(name))
    assert [len(question.answers) for question in made.questions] == [answers] * asked
    assert made.text.count("The secret number of") == (51 if name == "niah_multikey_2" else asked * answers)
    assert len({answer for question in made.questions for answer in question.answers}) == asked * answers


def test_a_chain_of_variables_is_in_order():
    made = VariableTracking(chains=2, hops=3).haystack(40, Random("vt"))
    exercise = made.text.rpartition("Follow the assignments")[2]
    for question in made.questions:
        value = question.text.split("?")[0].split()[-1]
        first, *rest = question.answers
        places = [exercise.index(f"VAR {first} = {value}.")]
        places += [exercise.index(f"VAR {b} = VAR {a}.") for a, b in zip((first, *rest), rest, strict=False)]
        assert places == sorted(places)
        assert len(question.answers) == 4


def test_common_and_frequent_words_are_the_most_frequent():
    for size in (0, 1, 1000):
        made = FrequentWords().haystack(size, Random("fwe"))
        words = [word for word in made.text.split("\n")[1].split() if word != "..."]
        counts = sorted({word: words.count(word) for word in words}.items(), key=lambda item: -item[1])
        assert {word for word, _ in counts[:3]} == set(made.questions[0].answers)
        assert len(counts) == 3 or counts[2][1] > counts[3][1]
        made = SHORT.haystack(size, Random("cwe"))
        listed = made.text.rpartition("\n")[2].split()[1::2]
        assert {word: listed.count(word) for word in made.questions[0].answers} == dict.fromkeys(
            made.questions[0].answers, 5
        )
        assert len(listed) == 15 + 2 * size


def test_documents_hold_the_answers_of_what_is_asked(questions):
    task = catalogue.ruler("qa", None, questions)
    assert task.most == 396
    made = task.haystack(task.most, Random("qa"))
    assert made.text.count("Document ") == 400
    depths = [made.text.index(question.answers[0] + " built") / len(made.text) for question in made.questions]
    assert depths == pytest.approx([question.depth for question in made.questions], abs=0.1)


@pytest.mark.parametrize(
    ("question", "said", "score"),
    [
        (Question("", ("12", "34")), "It is 12, or 33.", 0.5),
        (Question("", ("12", "34"), "any"), "It is 12, or 33.", 1.0),
        (Question("", ("Paris",), "any"), "in PARIS", 1.0),
        (Question("", ("Paris",)), "", 0.0),
    ],
)
def test_score(question, said, score):
    assert question.score(said) == score


@pytest.mark.parametrize(
    ("do", "told"),
    [
        (lambda: catalogue.chosen(["neddle"]), "--tasks neddle: no such task; did you mean needle?"),
        (lambda: catalogue.ruler("qa", TEXT, None), "give --questions FILE.jsonl"),
        (lambda: catalogue.ruler("niah_single_2", None, None), "give --haystack FILE"),
        (lambda: fit(Needles("needle", NOISE), 100, len, "", lambda _: 8), "--context 100: needle takes 2.. tokens or"),
        (lambda: fit(FEW, 1000, len, "", lambda _: 8), "--context 1000: all that qa is made of takes 1.. tokens; give"),
    ],
)
def test_wrong_use_is_told(do, told):
    with pytest.raises(UsageError, match=told.replace("?", r"\?")):
        do()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "empty"),
        ("{", "line 1: broken JSON"),
        ('{"question": "Who?", "answers": ["Ann"]}', "line 1: not a question with its answers"),
        ('{"question": "Who?", "answers": "Ann", "documents": ["Ann."]}', "line 1: not a question"),
    ],
)
def test_questions_that_are_none_are_told(content, told, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(UsageError, match=told):
        question_answering.from_file(path)


def test_names():
    assert catalogue.chosen(["needle", "ruler", "vt"]) == ["needle", *catalogue.RULER]
    assert catalogue.chosen(["vt", "vt"]) == ["vt"]


def test_sentences_and_words():
    assert split_sentences("One. Two\nlines!  Three?\n\nFour") == ["One.", "Two lines!", "Three?", "Four"]
    assert max(map(len, split_sentences("word " * 500))) <= 400
    assert spread("abcd", ["1", "2", "3"], [4, 0, 4]) == ["2", "a", "b", "c", "d", "1", "3"]
    for kind in ("numbers", "words", "uuids"):
        assert len(set(distinct(kind, 20_000, Random("distinct")))) == 20_000
