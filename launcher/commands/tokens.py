"""``esper token``: bearer tokens of people and of services."""

from __future__ import annotations

from datetime import timedelta

import click

from esper.contracts import TokenScope
from launcher.commands.installation import data_dir_option, installation


@click.group("token")
@data_dir_option
def token_group() -> None:
    """Issue, list and revoke tokens for trainers, Tamiyo and scripts."""


@token_group.command("issue")
@click.argument("account")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([str(scope) for scope in TokenScope]),
    help="What the token may do; may be given several times. Default: decide and read.",
)
@click.option("--name", help="The token's name in lists. Default: the account's name.")
@click.option("--project", help="It sees and makes runs of this project (prj_…) only.")
@click.option("--days", type=click.IntRange(min=1), help="It expires after so many days.")
def issue(
    account: str, scopes: tuple[str, ...], name: str | None, project: str | None, days: int | None
) -> None:
    """Print a new token of ACCOUNT. It is shown once and kept nowhere.

    An account that does not exist is created as a service account: role viewer, without a password,
    and it never decides. With --project it is made a researcher of that project, so that it can
    register runs there.
    """
    with installation():
        from django.utils import timezone

        from apps.accounts.actors import SYSTEM
        from apps.accounts.models import Project, User
        from apps.accounts.service_accounts import make_service_account
        from apps.accounts.services import issue_token

        place = Project.objects.filter(uid=project).first() if project else None
        if project and place is None:
            raise click.ClickException(f"There is no project {project}.")
        owner = User.objects.filter(username=account).first() or make_service_account(
            name=account, project=place, actor=SYSTEM
        )
        _, secret = issue_token(
            owner=owner,
            name=name or account,
            scopes=[TokenScope(scope) for scope in scopes or ("decide", "read")],
            expires_at=timezone.now() + timedelta(days=days) if days else None,
            project_id=place.pk if place is not None else None,
            actor=SYSTEM,
        )
        click.echo(secret)


@token_group.command("list")
@click.argument("account", required=False)
def list_tokens(account: str | None) -> None:
    """Print the tokens that work, of ACCOUNT or of everybody. Secrets are not shown."""
    with installation():
        from django.db.models import Q
        from django.utils import timezone

        from apps.accounts.models import ApiToken

        unexpired = Q(expires_at=None) | Q(expires_at__gt=timezone.now())
        tokens = ApiToken.objects.filter(unexpired, revoked_at=None).select_related("owner")
        if account:
            tokens = tokens.filter(owner__username=account)
        for token in tokens.order_by("owner__username", "id"):
            expiry = f"expires {token.expires_at:%Y-%m-%d}" if token.expires_at else "no expiry"
            scopes = ",".join(token.scopes)
            row = (token.uid, token.owner.get_username(), token.prefix, scopes, expiry, token.name)
            click.echo("  ".join(row))


@token_group.command("revoke")
@click.argument("token")
def revoke(token: str) -> None:
    """Revoke TOKEN, named by its uid or by its first characters. It stops working at once."""
    with installation():
        from apps.accounts.actors import SYSTEM
        from apps.accounts.models import ApiToken
        from apps.accounts.services import revoke_token

        live = ApiToken.objects.filter(revoked_at=None)
        found = list(live.filter(uid=token) or live.filter(prefix=token))
        if len(found) != 1:
            raise click.ClickException(
                f"{len(found)} working tokens are named {token!r}. "
                "Name one by its uid, as esper token list prints it."
            )
        revoke_token(token=found[0], actor=SYSTEM)
        click.echo(f"{found[0].uid} of {found[0].owner} is revoked")
