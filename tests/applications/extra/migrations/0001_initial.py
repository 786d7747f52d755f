from django.db import migrations, models


class Migration(migrations.Migration):
    initial = True
    operations = [
        migrations.CreateModel(
            name="Item",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=30, unique=True)),
                ("price", models.DecimalField(max_digits=8, decimal_places=2, default=0)),
                ("since", models.DateField(null=True, blank=True)),
                ("sheet", models.FileField(upload_to="sheets", blank=True)),
            ],
            options={"ordering": ["name"]},
        ),
    ]
