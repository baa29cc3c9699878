"""Everything that a process can do to its model while it trains, and what must follow a change.

order      rank 0 tells the other ranks; a script calls on each rank, so the ranks meet
change     the model, its optimizer, schedulers and copies; on all ranks, or on none
follow-up  health sampler, ledger audit and movement watch look at the changed model
report     the server gets what it did not order itself

Runs in the training thread, between two steps.

    surgery        puts grafts in, and holds the rest
    removals       takes grafts out
    remedies       applies remedies, ends and undoes them
    loads          grafts of a checkpoint, and of a plain state that the script loads
    after_change   what follows each of them; idle_slots: the slots that hold no graft
    subject        what they share: the model, what trains it, and who is told
"""

from esper.sdk.surgery.surgery import Surgery

__all__ = ["Surgery"]
