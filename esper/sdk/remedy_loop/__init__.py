"""Answers the open findings of one run with remedies.

    finding opens → the first remedy of its rule that fits here
        observe      kept in ``proposals`` as what Esper would do
        supervised   kept in ``proposals`` until a person approves or rejects it
        automatic    applied by rule, because every remedy of the catalogue can be undone
        with a server: proposed to it, in both modes; its command applies it
    remedy applied → its window → the finding is over: kept
                               → it is open still: ended, and the next remedy is tried
        with a server: the verdict is reported to it; its command ends it

Against loops of restoring: by rule, one remedy answers one kind of finding at most twice, the
second time with a stronger dose; the pause between two remedies doubles; and a run has a budget.
Then a person is asked. On several ranks rank 0 proposes: a server's command is applied on all of
them, and without a server the script calls session.remedy on each.

    loop           what is done in a step, in its order
    choosing       the next remedy of a finding: ladder (which), doses (how much), approval (who)
    applying       applies it; follow_ups: what is applied beside or after it
    verdicts       kept or ended, after its window
    other_data     a rewind that shows that the data changed is undone
    going_back     to where the first remedy was given, where none helped
    server         proposals to a server, and its commands
    history        what was done so far; young_run, losses: what it is decided by
"""

from esper.sdk.remedy_loop.loop import AFTER_GUARD_STEPS, RemedyLoop

__all__ = ["AFTER_GUARD_STEPS", "RemedyLoop"]
