"""One machine: ``esper up``, and commands beside it. SQLite, Valkey, plain HTTP on loopback.

The secrets come from the environment, or from the data directory's keyring.
"""

from __future__ import annotations

from esper_web import env
from esper_web.settings.base import *  # noqa: F403
from esper_web.settings.base import ESPER_DATA_DIR, channel_layers
from hosts.keyring import ensure_keyring
from hosts.runtime import DEFAULT_REDIS_PORT, running_redis_port

_keyring = ensure_keyring(ESPER_DATA_DIR)
_redis_port = running_redis_port(ESPER_DATA_DIR) or DEFAULT_REDIS_PORT

DEBUG = False
SECRET_KEY = env.text("SECRET_KEY", _keyring["secret_key"])
ALLOWED_HOSTS = env.listing("ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]")
CSRF_TRUSTED_ORIGINS = env.listing("CSRF_TRUSTED_ORIGINS", "")
DATABASES = {
    "default": env.database("DATABASE_URL", f"sqlite:///{ESPER_DATA_DIR / 'esper.sqlite3'}")
}
REDIS_URL = env.redis_url(
    "REDIS_URL", f"redis://:{_keyring['redis_password']}@127.0.0.1:{_redis_port}/0"
)
CELERY_BROKER_URL = REDIS_URL
CHANNEL_LAYERS = channel_layers(REDIS_URL)
ESPER_COMMAND_KEY = env.text("ESPER_COMMAND_KEY", _keyring["command_key"])
ESPER_AUDIT_KEY = env.text("ESPER_AUDIT_KEY", _keyring["audit_key"])
ESPER_KERNEL_PUBLIC_KEY = env.text("ESPER_KERNEL_PUBLIC_KEY", _keyring["kernel_public_key"])
# Served from the source tree or the installed package, without collectstatic.
WHITENOISE_USE_FINDERS = True
STATIC_ROOT = None
