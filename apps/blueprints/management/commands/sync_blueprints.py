from django.core.management.base import BaseCommand

from apps.blueprints.services import sync_catalogue


class Command(BaseCommand):
    help = "Bring the catalogues in the database up to the installed code."

    def handle(self, *args: object, **options: object) -> None:
        changed = sync_catalogue()
        self.stdout.write(
            f"{len(changed)} blueprints and remedies changed: {', '.join(changed) or 'none'}"
        )
