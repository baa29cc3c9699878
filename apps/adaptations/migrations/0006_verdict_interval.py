from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [("adaptations", "0005_spans")]

    operations = [
        migrations.AddField(
            model_name="adaptation",
            name="ablation_high",
            field=models.FloatField(blank=True, null=True),
        ),
        migrations.AddField(
            model_name="adaptation",
            name="ablation_low",
            field=models.FloatField(blank=True, null=True),
        ),
    ]
