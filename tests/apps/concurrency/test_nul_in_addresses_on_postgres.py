"""PostgreSQL refuses texts with a NUL: an address that holds one is wrong, not our error."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = [pytest.mark.postgres, pytest.mark.django_db]

ADDRESSES = (
    "/runs/%00",
    "/adaptations/a%00b",
    "/inbox?run=%00",
    "/audit?run=%00&actor=a%00b",
    "/violations?run=%00",
    "/kernels?q=%00",
    "/api/v1/runs/%00",
    "/api/v1/adaptations/%00",
    "/api/v1/runs/x/commands/%00/ack",
    "/api/v1/kernels/%00/manifest.json",
    "/api/v1/events?topic=run:%00",
    "/admin/runs/run/?q=%00",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_nul_in_an_address_is_refused(client: Any, django_user_model: Any, address: str) -> None:
    admin = django_user_model.objects.create_superuser(username="ada", role="admin")
    client.force_login(admin)
    assert client.get(address).status_code in {400, 404, 405}
