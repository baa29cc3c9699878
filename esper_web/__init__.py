"""The web project: settings, entry points and the supervisor behind ``./up``."""
