"""Texts with something hidden in them, and the question that asks for it."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

__all__ = ["TASKS", "Question", "key_value", "needle"]

CITIES = (
    "Lisbon",
    "Oslo",
    "Cairo",
    "Lima",
    "Quito",
    "Delhi",
    "Seoul",
    "Accra",
    "Riga",
    "Hanoi",
    "Tunis",
    "Perth",
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white", "brown", "grey", "pink")


class Question(NamedTuple):
    """Tokens of a context, of a question, and of its answer."""

    context: list[int]
    question: list[int]
    answer: list[int]


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def needle(tokenizer: Any, haystack: list[int], length: int, depth: float, seed: int) -> Question:
    """Hide a sentence with a number at `depth` (0 is the beginning) of `length` tokens of a text."""
    draw = random.Random(f"needle {length} {depth} {seed}")
    asked, number = f"The special magic number of {draw.choice(CITIES)} is", draw.randrange(10**6, 10**7)
    hidden = _plain(tokenizer, f"\n\n{asked} {number}. Remember it.\n\n")
    room = length - len(hidden)
    at = int(depth * room)
    context = [*haystack[:at], *hidden, *haystack[at:room]]
    return Question(context, _plain(tokenizer, f"\n\n{asked}"), _plain(tokenizer, f" {number}"))


def key_value(tokenizer: Any, haystack: list[int], length: int, depth: float, seed: int) -> Question:
    """Write `length` tokens of records, the same for all depths, and ask for the one at `depth`.

    `haystack` is not used.
    """
    draw = random.Random(f"key-value {length} {seed}")
    context = _plain(tokenizer, "These are the records.\n\n")
    numbers = draw.sample(range(10**4, 10**5), length // 8)
    records: list[tuple[int, str]] = []
    for number in numbers:
        value = f"{draw.choice(COLOURS)}-{draw.randrange(10**3, 10**4)}"
        line = _plain(tokenizer, f"Record {number}: {value}\n")
        if len(context) + len(line) > length:
            break
        context += line
        records.append((number, value))
    number, value = records[min(int(depth * len(records)), len(records) - 1)]
    return Question(context, _plain(tokenizer, f"\nRecord {number}:"), _plain(tokenizer, f" {value}"))


TASKS = {"needle": needle, "key-value": key_value}
