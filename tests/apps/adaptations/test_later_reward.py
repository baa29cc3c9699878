"""A kept graft earns the rest of its reward while its gain is still measured, and nobody else's."""

from __future__ import annotations

import pytest
from django.test import Client

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from esper.contracts import AdaptationState, Role, Verdict
from tests.apps.callers import Inbox, metrics, register
from tests.apps.cast import TAMIYO, force_state

pytestmark = pytest.mark.django_db

BORN, END = 1000, 1600  # the test ends 600 steps after the graft
AT_VERDICT = {"gain": 0.1, "not_yet_earned": -0.07}


def kept(inbox: Inbox) -> Adaptation:
    adaptation = inbox.waiting()
    force_state(adaptation, AdaptationState.PROBATION, graft_step=BORN)
    return services.judge_adaptation(
        adaptation=adaptation,
        verdict=Verdict(keep=True, reason="it pays"),
        reward_terms=dict(AT_VERDICT),
        actor=TAMIYO,
    )


def looked(inbox: Inbox, adaptation: Adaptation, step: int, share: float) -> None:
    gain, loss = f"ablation_gain:{adaptation.uid}", f"ablation_loss:{adaptation.uid}"
    inbox.trainer.send(metrics=[metrics(step, **{gain: 2.0 * share, loss: 2.0})])


def reward(adaptation: Adaptation) -> float:
    adaptation.refresh_from_db()
    assert adaptation.reward is not None
    assert adaptation.reward == pytest.approx(sum((adaptation.reward_terms or {}).values()))
    return adaptation.reward


def test_each_later_look_pays_a_part_and_changes_nothing_else(inbox: Inbox) -> None:
    adaptation = kept(inbox)
    version, events = adaptation.version, AuditEvent.objects.count()
    looked(inbox, adaptation, END, 0.1)  # of the test
    assert reward(adaptation) == pytest.approx(0.03)
    looked(inbox, adaptation, END + 300, 0.2)
    assert reward(adaptation) == pytest.approx(0.04)
    looked(inbox, adaptation, END + 600, 0.05)
    assert reward(adaptation) == pytest.approx(0.045)
    looked(inbox, adaptation, END + 900, -0.5)
    assert reward(adaptation) == pytest.approx(0.045)
    for n in range(4, 12):
        looked(inbox, adaptation, END + 300 * n, 0.1)
    assert reward(adaptation) == pytest.approx(0.03 + 0.015 + 0.04)
    assert (adaptation.state, adaptation.version) == (AdaptationState.KEPT, version)
    assert AuditEvent.objects.count() == events


def test_the_page_says_what_is_not_yet_earned(inbox: Inbox, people: dict[Role, User]) -> None:
    adaptation = kept(inbox)
    client = Client()
    client.force_login(people[Role.VIEWER])
    words = ("not yet earned", "The rest is earned while later looks still show the gain.")
    page = client.get(f"/adaptations/{adaptation.uid}").content.decode()
    assert all(one in page for one in words)
    for n in range(1, 8):
        looked(inbox, adaptation, END + 300 * n, 0.1)
    page = client.get(f"/adaptations/{adaptation.uid}").content.decode()
    assert not any(one in page for one in words)


@pytest.mark.parametrize("state", [AdaptationState.PROBATION, AdaptationState.REVERTED])
def test_what_is_not_kept_earns_nothing(inbox: Inbox, state: AdaptationState) -> None:
    adaptation = kept(inbox)
    force_state(adaptation, state)
    looked(inbox, adaptation, END + 300, 0.1)
    assert reward(adaptation) == pytest.approx(0.03)


def test_a_trainer_cannot_pay_the_graft_of_another_run(
    inbox: Inbox, people: dict[Role, User]
) -> None:
    adaptation = kept(inbox)
    other = register(people[Role.RESEARCHER], name="other")
    gain, loss = f"ablation_gain:{adaptation.uid}", f"ablation_loss:{adaptation.uid}"
    sent = other.send(metrics=[metrics(END + 300, **{gain: 1.0, loss: 2.0})])
    assert sent.status == 202
    assert reward(adaptation) == pytest.approx(0.03)
