"""What administrators do with the accounts of others."""

from __future__ import annotations

from typing import Any

from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person
from apps.accounts.endpoint import require
from apps.accounts.models import User
from apps.accounts.policy import Act
from apps.accounts.second_factor import remove_second_factor
from apps.rest.problems import not_found
from esper.contracts import Role


class PersonOutput(serializers.Serializer[Any]):
    username = serializers.CharField()
    role = serializers.ChoiceField(choices=list(Role))


def _account(request: Request, name: str) -> User:
    require(person(request), Act.MANAGE_PEOPLE)  # others do not learn which accounts there are
    account = User.objects.filter(username=name, is_service=False).first()
    if account is None:
        raise not_found("account")
    return account


RemoveSecondFactor = act_endpoint(
    "remove_second_factor",
    remove_second_factor,
    subject="account",
    find=_account,
    answer=lambda request, account: Response(PersonOutput(account).data),
    output=PersonOutput,
    dangerous=True,
)
