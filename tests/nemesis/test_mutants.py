"""The list of broken safety rules fits the code; ``python -m tests.nemesis.mutants`` tries it."""

from __future__ import annotations

import pytest

from hosts.paths import ROOT
from tests.nemesis.mutants import MUTANTS, Mutant, mutated


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.rule)
def test_a_rule_is_in_the_code_and_its_tests_are_there(mutant: Mutant) -> None:
    whole = (ROOT / mutant.file).read_text(encoding="utf-8")
    compile(mutated(mutant, whole), mutant.file, "exec")
    for test in mutant.tests:
        file, _, name = test.partition("::")
        path = ROOT / "tests" / file
        assert path.exists(), test
        assert not name or f"def {name}(" in path.read_text(encoding="utf-8"), test
