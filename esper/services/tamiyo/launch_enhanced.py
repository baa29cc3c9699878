"""Start Tamiyo: ``python -m esper.services.tamiyo.launch_enhanced``; ``--help`` lists settings."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from esper import tracing
from esper.exceptions import ConfigurationError
from esper.utils.config import ServiceConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT.

    Returns:
        0 after a clean stop, 2 for a setting that makes no sense, 1 when a port is taken.
    """
    options = _parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request
    try:
        config = _config(options)
        tracing.start("tamiyo")
        # Late: a wrong setting is told at once, and not after the seconds that torch takes.
        from esper.services.tamiyo.enhanced_main import EnhancedTamiyoService

        service = EnhancedTamiyoService(config)
        _report(config, len(service.catalog))
        asyncio.run(service.run_forever())
    except ConfigurationError as error:
        print(f"launch_enhanced: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"launch_enhanced: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m esper.services.tamiyo.launch_enhanced",
        description="Tamiyo decides for every live run of an Esper server.",
    )
    parser.add_argument("--redis-url", help="the health stream (default: REDIS_URL)")
    parser.add_argument("--urza-url", help="the Esper server (default: ESPER_SERVER)")
    parser.add_argument("--token", help="service token, scope decide (default: ESPER_TOKEN)")
    parser.add_argument("--host", default="127.0.0.1", help="of the status page")
    parser.add_argument("--port", type=int, default=0, help="of the status page; 0: none")
    parser.add_argument(
        "--no-learning", action="store_true", help="ignore the results of earlier adaptations"
    )
    return parser.parse_args(arguments)


def _config(options: argparse.Namespace) -> ServiceConfig:
    given: dict[str, Any] = {
        name: value
        for name in ("redis_url", "urza_url", "token")
        if (value := getattr(options, name)) is not None
    }
    if options.redis_url and not given.get("urza_url") and not ServiceConfig("tamiyo").urza_url:
        raise ConfigurationError(
            "--redis-url needs --urza-url: frames come from Redis, proposals go to the server"
        )
    return ServiceConfig(
        name="tamiyo",
        host=options.host,
        port=options.port,
        learning=not options.no_learning,
        **given,
    )


def _report(config: ServiceConfig, blueprints: int) -> None:
    print(
        f"Tamiyo {config.instance} with {blueprints} blueprints, "
        f"server {config.urza_url or 'none, in-process only'}, "
        f"learning {'on' if config.learning else 'off'}",
        flush=True,
    )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
