from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0001_tables"),
    ]

    operations = [
        migrations.AddField(
            model_name="run",
            name="taken_back",
            # A server of the earlier version registers runs until it is replaced.
            field=models.JSONField(default=list, db_default=[]),
        ),
    ]
