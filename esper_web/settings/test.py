"""For pytest and mypy: needs no service. ``DATABASE_URL`` may name a PostgreSQL."""

from __future__ import annotations

import tempfile
from pathlib import Path

from esper.contracts.signing import public_key
from esper_web import env
from esper_web.logs import logging_config
from esper_web.settings.base import *  # noqa: F403
from esper_web.settings.base import REST_FRAMEWORK

DEBUG = False
SECRET_KEY = "only-for-tests-" + "0123456789abcdef" * 4
ALLOWED_HOSTS = ["testserver", "127.0.0.1", "localhost"]
CSRF_TRUSTED_ORIGINS: list[str] = []
_directory = Path(tempfile.gettempdir()) / "esper-test"
ESPER_DATA_DIR = _directory
ESPER_KERNEL_STORE_DIR = _directory / "kernels"
ESPER_STAGE_DIR = _directory / "stage"
ESPER_LAUNCH_DIR = _directory / "launches"
ESPER_AUDIT_DIR = _directory / "audit"
STATIC_ROOT = None
WHITENOISE_USE_FINDERS = True
WHITENOISE_AUTOREFRESH = True  # else the client of each test lists all files

DATABASES = {"default": env.database("DATABASE_URL", "sqlite://:memory:")}
REDIS_URL = env.redis_url("REDIS_URL", "redis://127.0.0.1:6390/0")
# A pool would keep connections open while the test database is dropped.
DATABASES["default"].get("OPTIONS", {}).pop("pool", None)
CELERY_BROKER_URL = "memory://"
CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

# Fixed keys, so that a signed fixture stays valid. They protect nothing.
ESPER_COMMAND_KEY = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE="
ESPER_AUDIT_KEY = "AwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwMDAwM="
KERNEL_PRIVATE_KEY_OF_TESTS = "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="
ESPER_KERNEL_PUBLIC_KEY = public_key(KERNEL_PRIVATE_KEY_OF_TESTS)

LOGGING = logging_config(json_lines=False, level="WARNING")
REST_FRAMEWORK = REST_FRAMEWORK | {"DEFAULT_THROTTLE_CLASSES": []}
