"""What the top bar shows, and where the page's event stream starts."""

from __future__ import annotations

from collections.abc import Sequence

from apps.notifications.models import Feed
from apps.policies.models import AdaptationSwitch


def adaptation_switch() -> AdaptationSwitch:
    """The switch as it is; a page only reads, so a missing row is not written: it means on."""
    return AdaptationSwitch.objects.filter(pk=1).first() or AdaptationSwitch(pk=1, on=True)


def last_seqs(topics: Sequence[str]) -> dict[str, int]:
    """The newest sequence number of each topic, 0 for a topic without events."""
    known = dict(Feed.objects.filter(topic__in=topics).values_list("topic", "last_seq"))
    return {topic: known.get(topic, 0) for topic in topics}
