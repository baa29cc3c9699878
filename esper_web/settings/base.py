"""Settings that every installation shares. The environment sets the rest (docs/settings.md)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from csp.constants import NONE, SELF

from esper_web import env
from esper_web.logs import logging_config
from hosts.paths import ROOT, default_data_dir

ESPER_DATA_DIR = env.directory("ESPER_DATA_DIR", default_data_dir())

# --- applications -------------------------------------------------------------------------------

INSTALLED_APPS = [
    "apps.rest",
    "apps.accounts",
    "apps.audit",
    "apps.notifications",
    "apps.runs",
    "apps.telemetry",
    "apps.blueprints",
    "apps.policies",
    "apps.workers",
    "apps.kernels",
    "apps.violations",
    "apps.recipes",
    "apps.adaptations",
    "apps.trainers",
    "apps.console",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "channels",
    "csp",
]

MIDDLEWARE = [
    "apps.rest.middleware.RequestIdMiddleware",
    "apps.rest.middleware.NoNulMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "apps.console.language.PageLanguageMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "apps.rest.middleware.VisibleAdminMiddleware",
    "apps.accounts.second_factor_gate.SecondFactorGate",
    "apps.accounts.visibility.visibility_middleware",
]

AUTHENTICATION_BACKENDS = ["apps.accounts.backend.PeopleBackend"]
ROOT_URLCONF = "esper_web.urls"
ASGI_APPLICATION = "esper_web.asgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [ROOT / "templates", ROOT / "esper_web" / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    }
]

# --- language and time --------------------------------------------------------------------------

# Pages speak these; everything else is English (apps/console/language.py, docs/how-to/language.md).
LANGUAGE_CODE = "en-gb"
LANGUAGES = [("en-gb", "English"), ("de", "Deutsch")]
LANGUAGE_COOKIE_NAME = "language"
LANGUAGE_COOKIE_AGE = 365 * 24 * 3600
LANGUAGE_COOKIE_SAMESITE = "Lax"
LOCALE_PATHS = [ROOT / "locale"]
TIME_ZONE = "UTC"
USE_I18N = True
USE_TZ = True

# --- people -------------------------------------------------------------------------------------

AUTH_USER_MODEL = "accounts.User"
LOGIN_URL = "/login"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = LOGIN_URL
PASSWORD_HASHERS = [
    "apps.accounts.hashing.OneThreadArgon2PasswordHasher",
    "django.contrib.auth.hashers.PBKDF2PasswordHasher",
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
    {
        "NAME": "django.contrib.auth.password_validation.MinimumLengthValidator",
        "OPTIONS": {"min_length": 12},
    },
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

# Roles, of the account or in a project, that must set up an authenticator app.
ESPER_TOTP_REQUIRED_ROLES = env.roles("ESPER_TOTP_REQUIRED_ROLES")

# An OpenID provider through which people may sign in; no issuer: passwords only.
ESPER_OIDC_ISSUER = env.issuer("ESPER_OIDC_ISSUER")
ESPER_OIDC_CLIENT_ID = env.text("ESPER_OIDC_CLIENT_ID", "")
ESPER_OIDC_CLIENT_SECRET = env.text("ESPER_OIDC_CLIENT_SECRET", "")
# What each group of the provider may do here. Without a group of these nobody gets in.
ESPER_OIDC_ROLES = env.group_roles("ESPER_OIDC_ROLES")
ESPER_OIDC_GROUPS_CLAIM = env.text("ESPER_OIDC_GROUPS_CLAIM", "") or "groups"
ESPER_OIDC_SCOPES = env.text("ESPER_OIDC_SCOPES", "") or "openid profile email"
ESPER_OIDC_NAME = env.text("ESPER_OIDC_NAME", "") or "single sign-on"
env.together(
    "ESPER_OIDC_ISSUER",
    ESPER_OIDC_ISSUER,
    {
        "ESPER_OIDC_CLIENT_ID": ESPER_OIDC_CLIENT_ID,
        "ESPER_OIDC_CLIENT_SECRET": ESPER_OIDC_CLIENT_SECRET,
        "ESPER_OIDC_ROLES": ESPER_OIDC_ROLES,
    },
)

# --- browsers -----------------------------------------------------------------------------------

SESSION_COOKIE_AGE = 12 * 3600
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
CSRF_COOKIE_SAMESITE = "Lax"
X_FRAME_OPTIONS = "DENY"
SECURE_REFERRER_POLICY = "same-origin"
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": [SELF],
        "script-src": [SELF],
        "style-src": [SELF],
        "connect-src": [SELF],
        "img-src": [SELF, "data:"],
        "object-src": [NONE],
        "frame-ancestors": [NONE],
        "base-uri": [NONE],
        "form-action": [SELF],
    }
}
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024 * 1024
DATA_UPLOAD_MAX_NUMBER_FIELDS = 500

STATIC_URL = "/static/"
STATIC_ROOT: Path | None = ESPER_DATA_DIR / "staticfiles"
STATICFILES_DIRS = [ROOT / "static"] if (ROOT / "static").is_dir() else []

# --- REST API -----------------------------------------------------------------------------------

REST_FRAMEWORK: dict[str, Any] = {
    "DEFAULT_AUTHENTICATION_CLASSES": [
        "apps.accounts.authentication.TokenAuthentication",
        "apps.accounts.authentication.SessionAuthentication",
    ],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_PARSER_CLASSES": ["apps.rest.codec.StrictJSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["apps.rest.codec.StrictJSONRenderer"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "apps.rest.errors.problem_response",
    "TEST_REQUEST_RENDERER_CLASSES": ["apps.rest.codec.StrictJSONRenderer"],
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
    "UNAUTHENTICATED_USER": "django.contrib.auth.models.AnonymousUser",
}
SPECTACULAR_SETTINGS: dict[str, Any] = {
    "TITLE": "Esper",
    "DESCRIPTION": "Runs, adaptations, blueprints, kernels, violations and the audit log of Esper.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.1",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PERMISSIONS": ["rest_framework.permissions.IsAuthenticated"],
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    # With it each operation is a link inside a button, which a screen reader cannot tell apart.
    "SWAGGER_UI_SETTINGS": {"deepLinking": False},
    "SCHEMA_PATH_PREFIX": "/api/v1",
    "COMPONENT_SPLIT_REQUEST": True,
    # No shared enum components: five sets of states are called "state".
    "POSTPROCESSING_HOOKS": ["apps.rest.openapi_hooks.describe_operations"],
}

# It holds throttle counters only, so each web process may count for itself. Without Redis, requests
# are not refused.
CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}

# --- Redis: notifications only; all state is in the database ------------------------------------


def channel_layers(url: str) -> dict[str, Any]:
    """Pub/sub, because the other layer of channels_redis drops messages of a burst silently."""
    return {
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [url], "prefix": "esper:layer"},
        }
    }


CELERY_TASK_SERIALIZER = "json"
CELERY_RESULT_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_IGNORE_RESULT = True  # state is in the database
CELERY_TASK_ACKS_LATE = True
CELERY_TASK_REJECT_ON_WORKER_LOST = True  # attempts are counted in the database
CELERY_TASK_TIME_LIMIT = 180
CELERY_TASK_SOFT_TIME_LIMIT = 150
# Other queues are named where a task is sent: compile.<capability>, host.<host name>.
CELERY_TASK_DEFAULT_QUEUE = "control"
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_MAX_TASKS_PER_CHILD = 1000
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = True
CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT = 10
CELERY_WORKER_PROC_ALIVE_TIMEOUT = 60  # a compile worker's process waits for its first builder
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None  # retry until Redis is back
# A worker that loses Redis ends, and its supervisor starts another one, which waits for Redis:
# after some reconnections Celery's consumer takes no messages any more (apps/workers/stalls.py).
CELERY_BROKER_CONNECTION_RETRY = False
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 3600,
    # Lost messages are delivered again every interval × throttle = 5 s, not 100 s.
    "unacked_restore_interval": 5,
    "unacked_restore_throttle": 1,
    "health_check_interval": 10,
    "socket_keepalive": True,
    "global_keyprefix": "esper:celery:",
}
CELERY_TIMEZONE = "UTC"


# Where signed heads of the audit log are kept; a second place, best on another machine.
ESPER_AUDIT_DIR = env.directory("ESPER_AUDIT_DIR", ESPER_DATA_DIR / "audit")
ESPER_AUDIT_COPY_DIR = env.text("ESPER_AUDIT_COPY_DIR", "")
# The public halves of audit keys that were replaced: what they signed still counts.
ESPER_AUDIT_OLD_KEYS = env.listing("ESPER_AUDIT_OLD_KEYS", "")


def _every(task: str, seconds: float, *, queue: str = "control") -> dict[str, Any]:
    # A task that waited longer than two periods is dropped: the next one does its work.
    return {"task": task, "schedule": seconds, "options": {"queue": queue, "expires": seconds * 2}}


CELERY_BEAT_SCHEDULE = {
    "sweep-adaptations": _every("adaptations.sweep", 2.0),
    "relay-outbox": _every("notifications.relay_outbox", 2.0),
    "deliver-notifications": _every("notifications.deliver", 5.0),
    "forget-deliveries": _every("notifications.forget_deliveries", 3600.0),
    "forget-sent-messages": _every("notifications.forget_sent", 3600.0),
    "sweep-launches": _every("recipes.sweep", 5.0),
    "warm-kernels": _every("kernels.warm_next", 10.0),
    "limit-kernel-cache": _every("kernels.limit_cache", 300.0),
    "scrub-kernels": _every("kernels.scrub", 3600.0),
    "thin-telemetry": _every("telemetry.thin", 60.0),
    "sign-audit-head": _every("audit.sign_head", 10.0),
}

# --- Esper --------------------------------------------------------------------------------------

ESPER_KERNEL_STORE_DIR = env.directory("ESPER_KERNEL_STORE_DIR", ESPER_DATA_DIR / "kernels")
# A store for all hosts, such as s3://bucket/prefix?endpoint=…; empty: the directory above.
ESPER_KERNEL_STORE_URL = env.text("ESPER_KERNEL_STORE_URL", "")
ESPER_KERNEL_CACHE_MIB = env.integer(
    "ESPER_KERNEL_CACHE_MIB", 4096, minimum=1, maximum=100 * 1024 * 1024
)
ESPER_HOST_CACHE_MIB = env.integer(
    "ESPER_HOST_CACHE_MIB", 1024, minimum=1, maximum=100 * 1024 * 1024
)
# Tier 1: machine code for grafts, for trainers that name our key in ESPER_COMPILED_KERNEL_KEY.
ESPER_COMPILED_KERNELS = env.flag("ESPER_COMPILED_KERNELS", True)
# The number of kernels that are built ahead when a run registers; 0: none.
ESPER_WARM_UP_KERNELS = env.integer("ESPER_WARM_UP_KERNELS", 4, minimum=0, maximum=64)
ESPER_STAGE_DIR = env.directory("ESPER_STAGE_DIR", ESPER_DATA_DIR / "stage")
ESPER_HOST_NAME = env.text("ESPER_HOST_NAME", socket.gethostname())
# The devices that a compile worker builds for; its queues are compile.<capability>.
ESPER_WORKER_CAPABILITIES = env.listing("ESPER_WORKER_CAPABILITIES", "cpu")
# Builder processes of a compile worker: their number, and the limits of one build.
ESPER_BUILDERS = env.integer("ESPER_BUILDERS", 2, minimum=1, maximum=16)
ESPER_BUILD_TIMEOUT_SECONDS = env.integer("ESPER_BUILD_TIMEOUT_SECONDS", 60, minimum=1, maximum=140)
ESPER_BUILD_MEMORY_MIB = env.integer("ESPER_BUILD_MEMORY_MIB", 4096, minimum=64, maximum=1 << 20)
# The path of the private key that signs kernels. Only a compile worker has it.
ESPER_KERNEL_KEY_FILE = env.text("ESPER_KERNEL_KEY_FILE", "")
ESPER_COMPILE_LEASE_SECONDS = env.integer("ESPER_COMPILE_LEASE_SECONDS", 15, minimum=2, maximum=600)
ESPER_COMPILE_HEARTBEAT_SECONDS = env.integer(
    "ESPER_COMPILE_HEARTBEAT_SECONDS", 5, minimum=1, maximum=300
)
ESPER_COMPILE_ATTEMPTS = env.integer("ESPER_COMPILE_ATTEMPTS", 3, minimum=1, maximum=10)
ESPER_WORKER_HEARTBEAT_SECONDS = env.integer(
    "ESPER_WORKER_HEARTBEAT_SECONDS", 5, minimum=1, maximum=300
)
# After so many lost builders in a row, their worker is put into quarantine.
ESPER_WORKER_CRASHES_MAX = env.integer("ESPER_WORKER_CRASHES_MAX", 5, minimum=1, maximum=1000)
# A run whose trainer has not reported for so long is unreachable, and later lost.
ESPER_RUN_UNREACHABLE_SECONDS = env.integer(
    "ESPER_RUN_UNREACHABLE_SECONDS", 30, minimum=5, maximum=3600
)
ESPER_RUN_LOST_SECONDS = env.integer(
    "ESPER_RUN_LOST_SECONDS", 24 * 3600, minimum=60, maximum=30 * 24 * 3600
)
# Of the proposed grafts, so many of a hundred are tried in shadow without being asked for.
ESPER_SHADOW_PERCENT = env.integer("ESPER_SHADOW_PERCENT", 0, minimum=0, maximum=100)
# The recipes that operators may start on this host, and the folder of what was started.
ESPER_RECIPES = env.directory("ESPER_RECIPES", ROOT / "recipes")
ESPER_LAUNCH_DIR = env.directory("ESPER_LAUNCH_DIR", ESPER_DATA_DIR / "launches")
ESPER_LAUNCH_LOST_SECONDS = env.integer(
    "ESPER_LAUNCH_LOST_SECONDS", 60, minimum=10, maximum=24 * 3600
)
# How much telemetry is kept: frames of a run and values of a metric at full density, before older
# ones are thinned; and days after the end of a run, 0: for good.
ESPER_FRAMES_KEPT = env.integer("ESPER_FRAMES_KEPT", 5_000, minimum=100, maximum=10_000_000)
ESPER_METRICS_KEPT = env.integer("ESPER_METRICS_KEPT", 20_000, minimum=100, maximum=100_000_000)
ESPER_TELEMETRY_DAYS = env.integer("ESPER_TELEMETRY_DAYS", 0, minimum=0, maximum=36_500)
ESPER_LAUNCH_LIMIT = env.integer("ESPER_LAUNCH_LIMIT", 4, minimum=1, maximum=1000)
# The server's address for trainers that a worker starts.
ESPER_SERVER = env.text("ESPER_SERVER", "")
# The mail server of notifications; empty: none is sent.
EMAIL_HOST = env.text("ESPER_MAIL_HOST", "")
EMAIL_PORT = env.integer("ESPER_MAIL_PORT", 587, minimum=1, maximum=65535)
EMAIL_HOST_USER = env.text("ESPER_MAIL_USER", "")
EMAIL_HOST_PASSWORD = env.text("ESPER_MAIL_PASSWORD", "")
EMAIL_USE_TLS = env.flag("ESPER_MAIL_TLS", True)
EMAIL_TIMEOUT = 15
DEFAULT_FROM_EMAIL = env.text("ESPER_MAIL_FROM", "esper@localhost")
# The bearer token for /metrics; empty: only signed-in staff may read it.
ESPER_METRICS_TOKEN = env.text("ESPER_METRICS_TOKEN", "")

LOGGING = logging_config(
    json_lines=env.flag("ESPER_LOG_JSON", False), level=env.text("ESPER_LOG_LEVEL", "INFO").upper()
)
