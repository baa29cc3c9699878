"""A team's installation: every secret from the environment, HTTPS, PostgreSQL and Redis by URL."""

from __future__ import annotations

import secrets
from pathlib import Path

from django.core.exceptions import ImproperlyConfigured

from esper_web import env
from esper_web.logs import logging_config
from esper_web.settings.base import *  # noqa: F403
from esper_web.settings.base import channel_layers

if env.flag("DEBUG", False):
    raise ImproperlyConfigured("DEBUG must be off in production: its pages show secrets to anyone.")
DEBUG = False
# A worker that builds kernels or starts recipes signs nothing and holds none of these three. Django
# does not start without the first one, so each of its processes makes one of its own.
_issues = env.flag("ESPER_ISSUES_COMMANDS", True)
SECRET_KEY = env.secret("SECRET_KEY") if _issues else secrets.token_urlsafe(50)
ESPER_COMMAND_KEY = env.signing_key("ESPER_COMMAND_KEY") if _issues else ""
ESPER_AUDIT_KEY = env.signing_key("ESPER_AUDIT_KEY") if _issues else ""
ALLOWED_HOSTS = env.hosts("ALLOWED_HOSTS")
CSRF_TRUSTED_ORIGINS = env.listing("CSRF_TRUSTED_ORIGINS", "")
DATABASES = {"default": env.database("DATABASE_URL")}
REDIS_URL = env.redis_url("REDIS_URL")
CELERY_BROKER_URL = REDIS_URL
CHANNEL_LAYERS = channel_layers(REDIS_URL)
ESPER_KERNEL_PUBLIC_KEY = env.text("ESPER_KERNEL_PUBLIC_KEY")
# A team's host does not offer the demos.
ESPER_RECIPES = env.directory("ESPER_RECIPES", Path("/etc/esper/recipes"))

SECURE_SSL_REDIRECT = env.flag("ESPER_HTTPS_ONLY", True)
# nginx ends TLS and sets this header, after removing what a client sent (docker/nginx.conf).
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
# Probes and services of our own network (Tamiyo) use HTTP without nginx. From outside, only nginx
# can be reached, and it redirects by itself.
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$", r"^metrics$", r"^api/v1/"]
SECURE_HSTS_SECONDS = env.integer("ESPER_HSTS_SECONDS", 31_536_000, minimum=0, maximum=63_072_000)
SECURE_HSTS_INCLUDE_SUBDOMAINS = True
SECURE_HSTS_PRELOAD = True
SESSION_COOKIE_SECURE = True
CSRF_COOKIE_SECURE = True

STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedManifestStaticFilesStorage"},
}
LOGGING = logging_config(
    json_lines=env.flag("ESPER_LOG_JSON", True), level=env.text("ESPER_LOG_LEVEL", "INFO").upper()
)
