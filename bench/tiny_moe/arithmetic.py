"""Questions of arithmetic with worked steps, made from a seed.

Additions and subtractions of two-digit numbers, multiplications of one-digit numbers, and word problems of one sum.
Each answer writes one line a column and closes with ``Answer: N``.
"""

import random
from dataclasses import dataclass

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Laura", "Max")
THINGS = ("apples", "books", "coins", "stamps", "cards", "shells", "pens", "nuts", "eggs", "roses", "keys", "cups")
QUESTIONS = (
    "What is {sum}? Show each step and end with the answer.",
    "Compute {sum}. Show each step and end with the answer.",
    "Please work out {sum}. Show each step and end with the answer.",
    "How much is {sum}? Show each step and end with the answer.",
)
STORIES = {
    "+": (
        "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?",
        "There are {a} {thing} in a box. {name} adds {b} {thing}. How many {thing} are in the box?",
    ),
    "-": (
        "{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
        "There are {a} {thing} in a box. {name} takes {b} of them. How many {thing} stay in the box?",
    ),
    "*": (
        "{name} has {a} bags with {b} {thing} in each bag. How many {thing} does {name} have?",
        "{name} buys {b} {thing} a day for {a} days. How many {thing} does {name} have?",
    ),
}
STORY_FRACTION = 0.35
OPERATION_WEIGHTS = {"+": 0.45, "-": 0.35, "*": 0.2}


@dataclass(frozen=True, slots=True)
class Sum:
    """One question with its worked answer.

    Attributes:
        key: What decides the split: two questions of one key are in the same split.
        question: The user's words.
        answer: The steps and the closing line.
        result: The number after ``Answer:``.
    """

    key: str
    question: str
    answer: str
    result: int


def _addition_steps(a: int, b: int) -> list[str]:
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return [
        f"ones: {a % 10} + {b % 10} = {ones}, write {ones % 10}, carry {carry}",
        f"tens: {a // 10} + {b // 10} + {carry} = {tens}",
    ]


def _subtraction_steps(a: int, b: int) -> list[str]:
    borrow = int(a % 10 < b % 10)
    ones = a % 10 + 10 * borrow - b % 10
    tens = a // 10 - b // 10 - borrow
    return [
        f"ones: {a % 10 + 10 * borrow} - {b % 10} = {ones}, write {ones}, borrow {borrow}",
        f"tens: {a // 10} - {b // 10} - {borrow} = {tens}",
    ]


def make_sum(random_state: random.Random) -> Sum:
    """Draws one question.

    Additions and subtractions are keyed by their operands in either order, so that a held-out sum is in no training
    question in any wording. There are 64 products, so multiplications are keyed by the words of the question.
    """
    operation = random_state.choices(list(OPERATION_WEIGHTS), list(OPERATION_WEIGHTS.values()))[0]
    if operation == "*":
        a, b = random_state.randint(2, 9), random_state.randint(2, 9)
        result, steps = a * b, [f"product: {a} * {b} = {a * b}"]
    else:
        a, b = random_state.randint(10, 99), random_state.randint(10, 99)
        if operation == "-":
            a, b = max(a, b), min(a, b)
            result, steps = a - b, _subtraction_steps(a, b)
        else:
            result, steps = a + b, _addition_steps(a, b)
    if random_state.random() < STORY_FRACTION:
        question = random_state.choice(STORIES[operation]).format(
            a=a, b=b, name=random_state.choice(NAMES), thing=random_state.choice(THINGS)
        )
    else:
        question = random_state.choice(QUESTIONS).format(sum=f"{a} {operation} {b}")
    key = f"{operation}{min(a, b)},{max(a, b)}" + (question if operation == "*" else "")
    answer = "\n".join([f"{a} {operation} {b}", *steps, f"Answer: {result}"])
    return Sum(key=key, question=question, answer=answer, result=result)
