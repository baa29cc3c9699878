"""What a run says on the console: one line each, wherever the console is, and never an error."""

from __future__ import annotations

import copy
import io
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from _pytest.logging import LogCaptureHandler
from tqdm import tqdm

import esper
from esper.console import MAX_LENGTH, Console, write_line
from esper.contracts import AdaptationState, CommandKind, Finding, RunMode, Severity, ViolationRule
from esper.sdk import attaching
from tests.esper.sdk.test_local_loop import Bottleneck
from tests.esper.sdk.test_local_loop import attached as attached_bottleneck
from tests.esper.sdk.tiny_training import Training
from tests.esper.sdk.transport.attached import ended, graft_command, kernel_for, listening
from tests.esper.sdk.transport.control_plane import ControlPlane

Captured = pytest.CaptureFixture[str]


@contextmanager
def handlers(root_handlers: list[logging.Handler], level: int = logging.WARNING) -> Iterator[None]:
    """Exactly these handlers, at the root; pytest and Django have others."""
    root, esper_logger = logging.getLogger(), logging.getLogger("esper")
    before = root.handlers[:], esper_logger.handlers[:], root.level
    root.handlers[:], esper_logger.handlers[:] = root_handlers, []
    root.setLevel(level)
    try:
        yield
    finally:
        root.handlers[:], esper_logger.handlers[:] = before[:2]
        root.setLevel(before[2])


@pytest.fixture(autouse=True)
def _no_handlers() -> Iterator[None]:
    """As in a script that has not configured logging, but for what pytest catches."""
    root = logging.getLogger()
    others = [h for h in root.handlers if not isinstance(h, LogCaptureHandler)]
    for handler in others:
        root.removeHandler(handler)
    yield
    for handler in others:
        root.addHandler(handler)


class Keeper(logging.Handler):
    """What a handler of the user gets, from INFO on; it writes nothing on the console."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    root, keeper = logging.getLogger(), Keeper()
    level = root.level
    root.addHandler(keeper)
    root.setLevel(logging.INFO)
    yield keeper.messages
    root.setLevel(level)
    root.removeHandler(keeper)


def attached(training: Training, **options: Any) -> esper.Session:
    return esper.attach(
        training.model, training.optimizer, run="voice", scheduler=training.scheduler, **options
    )


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def a_finding(layer: str, severity: Severity = Severity.CAUTION) -> Finding:
    return Finding(
        ViolationRule.OPTIMIZER_LEDGER, layer, severity, "it does not learn", "it learns", "Look."
    )


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(RunMode))
def test_attaching_is_one_line_with_mode_layers_and_where_to_look(
    training: Training, mode: RunMode, capsys: Captured
) -> None:
    with attached(training, mode=mode):
        (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith(f"esper: attached 'voice': {mode} mode, 3 layers")
    assert "local" in line


def test_a_server_is_named_where_to_look(training: Training, capsys: Captured) -> None:
    session = attached(training, server="http://127.0.0.1:9", token="esp_x")
    (line,) = lines_of(capsys.readouterr().err)
    session.close(timeout=0.0)
    assert "http://127.0.0.1:9" in line


def test_grafts_remedies_and_undos_are_said_one_line_each(
    training: Training, capsys: Captured
) -> None:
    with attached(training, mode="supervised") as session:
        training.run(2, session)
        capsys.readouterr()
        receipt = session.graft("3", "proj_lora_64")
        training.run(2, session)
        session.undo(receipt)
        remedy = session.set_lr("3", 0.5)
        session.undo(remedy)
    grafted, undone, remedied, rewound = lines_of(capsys.readouterr().err)
    assert "step 2: grafted proj_lora_64 into '3'" in grafted
    assert "step 4: took proj_lora_64 out of '3': asked for by the script" in undone
    assert "rewound to step 2" in undone
    assert "applied: halve the learning rate at '3'" in remedied
    assert remedied.endswith("To take it back: session.undo(session.remedies[-1])")
    assert "undid: halve the learning rate at '3'" in rewound


def test_findings_and_remedies_are_said_by_their_titles(
    training: Training, capsys: Captured
) -> None:
    with attached(training, mode="supervised") as session:
        training.run(1, session)
        capsys.readouterr()
        parts = session._parts
        parts.surgery.remedies.apply("match_updates", "", None, {}, "update_ratio_low")
        parts.announcer.remedy_judged("match_updates", "kept")
    applied, judged = lines_of(capsys.readouterr().err)
    assert (
        "applied: change the learning rate until an update is 0.001 of the weights, because of "
        "“Updates are too small”. To take it back: "
    ) in applied
    assert judged.endswith("“Match the learning rate to the updates”: kept")


@pytest.mark.parametrize("hard", [True, False])
def test_an_undo_by_the_receipt_says_nothing_untrue_of_the_weights(
    training: Training, capsys: Captured, hard: bool
) -> None:
    """The session sees only that the graft is gone; a hard undo keeps nothing that was learned."""
    session = attached(training)
    training.run(3, session)
    session.graft("3", "proj_lora_64").undo(hard)
    training.run(1, session)

    line = next(line for line in lines_of(capsys.readouterr().err) if "took proj_lora_64" in line)
    assert line.endswith("receipt.undo() was called, or another session took it out")


def test_the_guard_says_what_it_took_out_and_why(training: Training, capsys: Captured) -> None:
    with attached(training, mode="supervised") as session:
        training.run(30, session)
        session.graft("3", "proj_lora_64")
        training.run(3, session)
        capsys.readouterr()
        training.spoil = lambda loss: loss * float("nan")
        training.step(session)
    line = lines_of(capsys.readouterr().err)[0]
    assert "took proj_lora_64 out of '3'" in line
    assert "the loss became nan" in line
    assert "rewound to step 30" in line


def test_the_printed_line_of_python_answers_what_waits(capsys: Captured) -> None:
    host = Bottleneck()
    with attached_bottleneck(host, "supervised") as session:
        host.run_until(lambda: session.waiting, session)
        (line,) = [text for text in lines_of(capsys.readouterr().err) if "waits for you" in text]
        answer = re.search(r"Answer: (session\.approve\(.*?\)) or (session\.reject\(.*?\))\.", line)
        assert answer is not None
        receipt = eval(answer[1], {"session": session})
        assert receipt.present
        assert session.waiting == ()


def test_an_answer_for_a_layer_that_nothing_waits_for_names_those_that_do() -> None:
    host = Bottleneck()
    with attached_bottleneck(host, "supervised") as session:
        host.run_until(lambda: session.waiting, session)
        (waiting,) = session.waiting
        with pytest.raises(ValueError, match=rf"one waits for '{waiting.layer}'"):
            session.approve("1")
        session.reject(waiting.layer)
        with pytest.raises(ValueError, match="none waits for any layer"):
            session.reject(waiting.layer)


def test_the_end_of_probation_is_said_with_its_reason(capsys: Captured) -> None:
    host = Bottleneck()
    with attached_bottleneck(host, "automatic") as session:
        host.run_until(lambda: any(e.verdict for e in session.adaptations), session)
        (closed, *_) = [entry for entry in session.adaptations if entry.verdict is not None]
    said = capsys.readouterr().err
    assert closed.verdict is not None
    end = "kept" if closed.state is AdaptationState.KEPT else "took"
    assert re.search(rf"step \d+: {end} {closed.blueprint} ", said)
    assert closed.verdict.reason.rstrip(". ") in said


def test_observe_mode_says_what_it_would_propose_and_does_nothing(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esper.sdk.local.FIRST_OPINION_SECONDS", 0.0)
    host = Bottleneck()
    said = ""
    with attached_bottleneck(host, "observe") as session:

        def proposed() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "would propose" in said

        host.run_until(proposed, session)
        assert session.adaptations == session.waiting == ()
    assert 'mode="supervised"' in said


def test_a_finding_is_said_once_and_one_of_no_weight_is_not(
    training: Training, capsys: Captured, logged: list[str]
) -> None:
    with attached(training) as session:
        capsys.readouterr()
        for _ in range(3):
            session._parts.findings.add(a_finding("3"))
        session._parts.findings.add(a_finding("5", Severity.INFO))
        (line,) = lines_of(capsys.readouterr().err)
    assert line.startswith("esper: caution finding at '3': it does not learn. Look.")
    assert any("info finding at '5'" in message for message in logged)


def test_a_flood_is_folded(training: Training, capsys: Captured) -> None:
    with attached(training) as session:
        training.step(session)
        capsys.readouterr()
        for place in range(15):
            session._parts.findings.add(a_finding(f"layer{place}"))
        training.step(session)
        lines = lines_of(capsys.readouterr().err)
        assert len(lines) == 4
        assert "… and 12 more" in lines[-1]
        for place in range(15, 20):
            session._parts.findings.add(a_finding(f"layer{place}"))
        training.run(50, session)
        assert capsys.readouterr().err == ""
        training.run(60, session)
        (line,) = lines_of(capsys.readouterr().err)
        assert "… and 5 more" in line


# -- where it is said ------------------------------------------------------------------------------


def tell(training: Training, **options: Any) -> None:
    """Of each kind one line: attached, a graft, a finding, an undo."""
    with attached(training, mode="supervised", **options) as session:
        training.run(2, session)
        receipt = session.graft("3", "proj_lora_64")
        session._parts.findings.add(a_finding("3"))
        training.run(1, session)
        session.undo(receipt)


def test_without_logging_each_line_comes_once(training: Training, capsys: Captured) -> None:
    with handlers([]):
        tell(training)
    lines = lines_of(capsys.readouterr().err)
    assert len(lines) == len(set(lines)) == 4
    assert all(line.startswith("esper: ") for line in lines)
    assert logging.getLogger("esper").handlers == []


@pytest.mark.parametrize("way", ["argument", "0", "false", "OFF"])
def test_it_can_be_silenced(
    training: Training, capsys: Captured, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way != "argument":
        monkeypatch.setenv("ESPER_VERBOSE", way)
    with handlers([]):
        tell(training, verbose=way != "argument")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("verbose", [True, False])
def test_logging_carries_all(training: Training, logged: list[str], verbose: bool) -> None:
    tell(training, verbose=verbose)
    for words in ("attached 'voice'", "grafted proj_lora_64", "caution finding", "took proj_lora"):
        assert sum(words in message for message in logged) == 1, words


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.CRITICAL])
def test_what_logging_shows_on_the_console_is_not_said_twice(
    training: Training, capsys: Captured, level: int
) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("LOG %(message)s"))
    handler.addFilter(logging.Filter("esper"))  # other libraries may log too
    with handlers([handler], level):
        tell(training)
    lines = lines_of(capsys.readouterr().err)
    texts = [re.sub("^(LOG|esper:) ", "", line) for line in lines]
    assert len(texts) == len(set(texts)) == 4
    logged = {logging.INFO: 4, logging.WARNING: 1, logging.CRITICAL: 0}[level]
    assert sum(line.startswith("LOG ") for line in lines) == logged


def test_a_level_of_ones_own_is_respected(training: Training, capsys: Captured) -> None:
    logger = logging.getLogger("esper")
    logger.setLevel(logging.WARNING)
    try:
        tell(training)
    finally:
        logger.setLevel(logging.NOTSET)
    (line,) = lines_of(capsys.readouterr().err)
    assert "caution finding" in line


def test_a_warning_of_the_library_itself_is_one_line(capsys: Captured) -> None:
    with handlers([]):
        try:
            raise RuntimeError("two\nlines")
        except RuntimeError:
            logging.getLogger("esper").exception("Esper's guard failed")
    (line,) = lines_of(capsys.readouterr().err)
    assert line == "esper: Esper's guard failed: RuntimeError: two lines"


def test_ranks_that_do_not_decide_are_silent(
    training: Training, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 1
    )
    monkeypatch.setattr("esper.sdk.announcing.distributed", group)
    tell(training)
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_stays_whole(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    with tqdm(total=10, file=terminal, mininterval=0.0) as bar:
        bar.update(3)
        tell(training)
        bar.update(3)
    rows = [row.split("\r")[-1] for row in terminal.getvalue().split("\n")]
    said = [row for row in rows if "esper: " in row]
    assert len(said) == 4
    assert all(row.startswith("esper: ") for row in said)


def test_tqdm_is_not_imported(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.delitem(sys.modules, "tqdm")
    write_line("a line")
    assert capsys.readouterr().err == "a line\n"
    assert "tqdm" not in sys.modules


class Broken(io.StringIO):
    """A terminal that has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError("the other end is closed")


class Closed(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.close()


@pytest.mark.parametrize("bars", [False, True], ids=["plain", "with a bar"])
@pytest.mark.parametrize("stderr", [Broken, Closed, lambda: None, object])
def test_a_console_that_is_gone_is_no_error(
    training: Training, monkeypatch: pytest.MonkeyPatch, stderr: Callable[[], Any], bars: bool
) -> None:
    with tqdm(total=10, file=io.StringIO(), disable=not bars):
        monkeypatch.setattr(sys, "stderr", stderr())
        tell(training)


class Terminal(io.TextIOWrapper):
    """Raises where it cannot encode a sign; says what one likes about its encoding."""

    def __init__(self, encoding: str) -> None:
        self.shown = io.BytesIO()
        known = encoding if encoding in ("latin-1", "cp1252", "utf-8") else "ascii"
        super().__init__(self.shown, encoding=known, errors="strict")
        self._told = encoding

    @property
    def encoding(self) -> str:
        return self._told


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", "no such encoding"])
def test_any_terminal_can_show_it(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stderr", terminal)
    write_line("loss 3 ± 1 → 12 × … in Schicht 变换器 \ud800")
    terminal.flush()
    shown = terminal.shown.getvalue()
    assert shown.count(b"\n") == 1
    assert b"in Schicht" in shown


def test_a_line_is_one_line_without_control_characters(capsys: Captured) -> None:
    write_line("a\nb\r\x1b[2Jc" + "d" * 2 * MAX_LENGTH)
    shown = capsys.readouterr().err
    assert shown.startswith("a b [2Jcd")
    assert shown.count("\n") == 1
    assert len(shown) == MAX_LENGTH + 1


def test_the_same_line_comes_again_after_a_long_time(capsys: Captured) -> None:
    console = Console(enabled=True)
    for step in range(0, 3000, 100):
        console.say("the same", step=step, kind="lines")
        console.fold(step)
    assert len(lines_of(capsys.readouterr().err)) == 3


# -- attaching twice, names ------------------------------------------------------------------------


def test_a_second_attach_warns_and_the_older_session_does_no_harm(
    training: Training, capsys: Captured
) -> None:
    older = attached(training, mode="automatic")
    training.run(3, older)
    capsys.readouterr()
    with attached(training, mode="supervised") as session:
        said = capsys.readouterr().err
        assert "attached already, as 'voice'" in said
        assert "session.close()" in said
        for _ in range(3):
            older.step(training.step(session))
        receipt = session.graft("3", "proj_lora_64")
        assert receipt.present
        session.undo(receipt)
    older.close()


@pytest.mark.parametrize("end", ["closed", "forgotten"])
def test_an_attach_after_the_end_of_the_older_session_is_no_second_one(
    training: Training, capsys: Captured, end: str
) -> None:
    older: esper.Session | None = attached(training)
    assert older is not None
    older.close()
    if end == "forgotten":
        older = None
    with attached(training):
        assert "attached already" not in capsys.readouterr().err


def test_the_modes_of_the_signature_are_those_that_there_are() -> None:
    assert set(attaching.Mode.__args__) == set(RunMode)  # type: ignore[attr-defined]


def test_what_attach_finds_is_said_after_its_own_line(training: Training, capsys: Captured) -> None:
    training.optimizer.param_groups[0]["params"].pop()
    with attached(training):
        first, second = lines_of(capsys.readouterr().err)
    assert first.startswith("esper: attached")
    assert "serious finding at '5': bias: trainable, but in no optimizer" in second


def test_grafts_that_go_and_come_with_a_loaded_state_are_said(
    training: Training, capsys: Captured
) -> None:
    with attached(training, mode="supervised") as session:
        training.run(2, session)
        without = copy.deepcopy(training.model.state_dict())
        session.graft("3", "proj_lora_64")
        training.run(2, session)
        having = copy.deepcopy(training.model.state_dict())
        capsys.readouterr()
        training.model.load_state_dict(without)
        training.model.load_state_dict(having)
        went, came = lines_of(capsys.readouterr().err)
    assert "took proj_lora_64 out of '3': the script loaded a state" in went
    assert "grafted proj_lora_64 into '3' again: the script loaded a state" in came


def test_a_server_tells_its_page_and_what_waits_there(
    training: Training, plane: ControlPlane, capsys: Captured
) -> None:
    with listening(training, plane, mode="supervised") as session:
        graft = {"type": "waiting", "adaptation": "a1", "layer": "3", "blueprint": "ln_rms"}
        remedy = {"type": "waiting", "adaptation": "a/2\n", "blueprint": "rewind"}
        for event in (graft, graft, remedy):
            plane.push(event)
        plane.push({"type": "waiting"})
        said = ""

        def complete() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return "adaptations/a%2F2%0A" in said and "adaptations/\n" in said

        training.until(complete, session)
    lines = lines_of(said)
    assert f"esper: the run's page: {plane.url}/runs/{plane.uid}" in lines
    assert sum(f"waits for a person: {plane.url}/adaptations/a1" in line for line in lines) == 1
    (rewind,) = [line for line in lines if line.endswith("/adaptations/a%2F2%0A")]
    assert "“Rewind to a good state” waits for a person: " in rewind
    assert all(line.startswith("esper: ") for line in lines)


def test_what_the_server_orders_is_said(
    training: Training, plane: ControlPlane, capsys: Captured
) -> None:
    with listening(training, plane) as session:
        plane.send(graft_command(plane, 1, kernel_for(session, plane)))
        training.until(lambda: ended(plane, 1), session)
        plane.send(plane.command(CommandKind.KEEP, 2, adaptation="a1"))
        training.until(lambda: ended(plane, 2), session)
        plane.send(plane.command(CommandKind.UNDO, 3, adaptation="a1"))
        training.until(lambda: ended(plane, 3), session)
    said = capsys.readouterr().err
    assert re.search(r"grafted proj_lora_64 into '3'", said)
    assert re.search(r"kept proj_lora_64 in '3'", said)
    assert re.search(r"took proj_lora_64 out of '3': ordered by the server", said)


def test_a_filter_of_the_user_that_raises_stops_nothing(
    training: Training, capsys: Captured
) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("a filter of the user")

    logger = logging.getLogger("esper")
    logger.addFilter(fail)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.INFO)
    try:
        tell(training)
    finally:
        logger.removeFilter(fail)
        logging.getLogger().setLevel(level)
    assert len(lines_of(capsys.readouterr().err)) == 4


def test_what_was_held_back_is_counted_at_the_end(training: Training, capsys: Captured) -> None:
    with attached(training) as session:
        for place in range(15):
            session._parts.findings.add(a_finding(f"layer{place}"))
    assert "… and 12 more" in lines_of(capsys.readouterr().err)[-1]
