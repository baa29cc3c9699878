"""The same work in several threads, from one starting gun."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from django.db import connections

from apps.rest.problems import Problem

Answer = TypeVar("Answer")
THREADS = 8


def answers_at_once(work: Callable[[int], Answer], threads: int = THREADS) -> list[Answer]:
    """What ``work(i)`` answers in each thread, in the order in which they end."""
    gun, answers = threading.Barrier(threads), list[Answer]()

    def runner(index: int) -> None:
        gun.wait()
        try:
            answers.append(work(index))
        finally:
            connections.close_all()

    started = [threading.Thread(target=runner, args=(index,)) for index in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(600)
    assert len(answers) == threads
    return answers


def count_at_once(work: Callable[[int], str]) -> Counter[str]:
    """How often each answer came; of a problem its status and code."""

    def answer(index: int) -> str:
        try:
            return work(index)
        except Problem as problem:
            return f"{problem.status} {problem.code}"

    return Counter(answers_at_once(answer))
