"""Write ``docs/tour.md``, and take its pictures from a running Esper.

python -m scripts.tour                          write the page
python -m scripts.tour --check                  exit 1 where the page differs
python -m scripts.tour_pictures DATA_DIRECTORY  take the pictures, of the ``up`` that runs there
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from scripts.generated_page import write_or_check

DOCS = Path(__file__).resolve().parents[1] / "docs"
TARGET = DOCS / "tour.md"
PICTURES = DOCS / "images" / "tour"
HEADER = """# A tour of the console

Written by `python -m scripts.tour`. `python -m scripts.tour_pictures` takes the pictures from the
demo runs of `./up`: nothing in them is drawn by hand.
"""


@dataclass(frozen=True)
class Stop:
    """One page of the console.

    Attributes:
        page: its name in ``apps/console/urls.py``.
        title: a heading.
        text: what a person does there.
        address: its path, in which ``{run}``, ``{waiting}``, ``{kept}``, ``{recipe}``,
            ``{launch}`` and ``{kernel}`` stand for objects of the installation.
        phone: the picture is taken on a phone.
        dark: in the dark theme.
    """

    page: str
    title: str
    text: str
    address: str
    phone: bool = False
    dark: bool = False

    @property
    def picture(self) -> Path:
        return PICTURES / f"{self.name}.jpg"

    @property
    def name(self) -> str:
        return self.title.lower().replace(" ", "-").replace(",", "").replace("'", "")


STOPS = (
    Stop(
        "sign-in",
        "Sign in",
        "The first start writes the passwords of five people, one for each role.",
        "/login",
    ),
    Stop(
        "overview",
        "Overview",
        "What needs a person stands first, then the runs with their loss and health.",
        "/",
    ),
    Stop(
        "inbox",
        "Inbox",
        "All proposals that wait, the most urgent first, each with its deadline.",
        "/inbox",
    ),
    Stop(
        "adaptation",
        "A decision",
        "What is proposed, the evidence at the step where it was asked, the forecast with its "
        "interval, what speaks against it, and the buttons.",
        "/adaptations/{waiting}",
    ),
    Stop(
        "adaptation",
        "A decision on a phone",
        "The question, the reasons and the buttons are on the first screen.",
        "/adaptations/{waiting}",
        phone=True,
        dark=True,
    ),
    Stop(
        "adaptation",
        "After the decision",
        "The running test of an applied adaptation: its step, its gain against the limits, and "
        "what would take it out.",
        "/adaptations/{kept}",
    ),
    Stop(
        "runs",
        "Runs",
        "All runs, with filters that can be saved as a view.",
        "/runs",
    ),
    Stop(
        "run",
        "A run",
        "Loss, findings, the map of layers and the adaptations share one axis of steps. Any "
        "remedy can be asked for from here.",
        "/runs/{run}",
    ),
    Stop(
        "run",
        "A run in the dark theme",
        "The same page; the theme follows the system or a setting.",
        "/runs/{run}",
        dark=True,
    ),
    Stop(
        "compare",
        "Compare",
        "Two runs side by side: settings, architecture, grafts and losses.",
        "/runs/compare?a={run}&b={other}",
    ),
    Stop(
        "incidents",
        "Incidents",
        "Findings that belong together: what is wrong, where it began, and what would help.",
        "/incidents",
    ),
    Stop(
        "violations",
        "Violations",
        "Each single rule that was broken, for the record.",
        "/violations",
    ),
    Stop(
        "switch",
        "Switch",
        "Stop all adaptations, of one project, one run or one blueprint; each trainer answers.",
        "/switch",
    ),
    Stop(
        "policy",
        "Policy",
        "The thresholds in force, who wrote them, and whether the confidence was right so far.",
        "/policy",
    ),
    Stop(
        "blueprints",
        "Blueprints",
        "What may be grafted, with its cost, risk and past.",
        "/blueprints",
    ),
    Stop(
        "blueprint",
        "A blueprint",
        "One of them: where it fits, what it computes, and how it did so far.",
        "/blueprints/mlp_gelu_2048",
    ),
    Stop(
        "kernels",
        "Kernels",
        "Grafts that workers have built, checked and signed.",
        "/kernels",
    ),
    Stop(
        "kernel",
        "A kernel",
        "One kernel: who built it, what was measured, and its signature.",
        "/kernels/{kernel}",
    ),
    Stop(
        "workers",
        "Workers",
        "The processes that build kernels and carry out tasks.",
        "/workers",
    ),
    Stop(
        "recipes",
        "Recipes",
        "Training scripts that can be started from the console.",
        "/recipes",
    ),
    Stop(
        "recipe",
        "A recipe",
        "Its settings, and the hosts that can run it.",
        "/recipes/{recipe}",
    ),
    Stop(
        "audit",
        "Audit log",
        "Who did what, when and why, in a chain that shows every change.",
        "/audit",
    ),
    Stop(
        "search",
        "Search",
        "Ctrl+K finds runs, adaptations, blueprints and pages.",
        "/search?q=topics",
    ),
    Stop(
        "projects",
        "Projects",
        "Who sees which runs, and with which role. With one project everybody sees everything.",
        "/projects",
    ),
    Stop(
        "duty",
        "Duty",
        "Who is told first of a question, and when everybody is.",
        "/duty",
    ),
    Stop(
        "status",
        "Status",
        "Whether all parts of the installation report, and how late they are.",
        "/status",
    ),
    Stop(
        "wall",
        "Wall display",
        "Large figures for a screen in the room.",
        "/wall",
        dark=True,
    ),
    Stop(
        "report",
        "Weekly report",
        "What happened in a week, to print or to send.",
        "/report",
    ),
    Stop(
        "me",
        "My settings",
        "Sessions, tokens, channels, theme and time zone of the person who is signed in.",
        "/me",
    ),
    Stop(
        "accessibility",
        "Accessibility",
        "What was tested, and what is known to be missing.",
        "/accessibility",
    ),
)
# Addresses that show no page of their own, and what has to be started first.
NOT_SHOWN = {
    "sign-out": "it leads to the sign-in",
    "provider-sign-in": "it leads to the OpenID provider",
    "provider-callback": "the way back from the OpenID provider",
    "sign-in-code": "the second page of a sign-in, for whoever has an authenticator app",
    "identity": "a question after the way back from the OpenID provider",
    "second-factor": "it shows a secret, or what was made from it",
    "people": "a list of accounts for administrators",
    "bar": "the part of each page that is loaded again",
    "freeze-banner": "the part of each page that says what is frozen",
    "words": "the texts of the scripts in another language",
    "set-language": "an act of the sign-in page",
    "save-settings": "an act of My settings",
    "save-view": "an act of Runs",
    "step-up": "a dialog before dangerous acts",
    "plan": "several decisions as one; the demo runs propose none",
    "launch": "a started recipe; the demo starts none",
}


def render() -> str:
    """The whole file."""
    sections = [
        f"## {stop.title}\n\n{stop.text}\n\n"
        f"![{stop.title}]({stop.picture.relative_to(DOCS).as_posix()})\n"
        for stop in STOPS
    ]
    return "\n".join([HEADER, *sections])


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, render, __doc__))
