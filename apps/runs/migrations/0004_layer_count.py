from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("runs", "0003_command_kinds"),
    ]

    operations = [
        migrations.AddField(
            model_name="run",
            name="layer_count",
            field=models.PositiveIntegerField(default=0),
        ),
    ]
