"""The help of ``esper`` lists its commands by what a person wants to do."""

from __future__ import annotations

import click

SECTIONS = {
    "Start and set up": (
        "up", "doctor", "token", "projects", "people", "duty", "channels", "completion", "manage",
        "version",
    ),
    "See what happens": (
        "runs", "watch", "findings", "adaptations", "show", "workers", "kernels", "blueprints",
        "variants", "policy",
    ),
    "Decide": (
        "inbox", "approve", "reject", "claim", "release", "assign", "escalate", "extend", "snooze",
        "plans", "shadow", "delegations",
    ),
    "Act on a run": (
        "remedy", "rollback", "cancel", "pause", "resume", "stop", "kill", "freeze", "recipe",
        "branch",
    ),
    "Prove, back up, connect": (
        "audit", "replay", "backup", "restore", "restored", "rotate", "mcp",
    ),
}  # fmt: skip
_WHOLE_SENTENCE = 300


class SectionedGroup(click.Group):
    """A group with many commands: in sections, each with its whole first sentence."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            commands = [(name, self.commands[name]) for name in names if name in self.commands]
            rows = [(name, entry.get_short_help_str(_WHOLE_SENTENCE)) for name, entry in commands]
            with formatter.section(title):
                formatter.write_dl(rows)
