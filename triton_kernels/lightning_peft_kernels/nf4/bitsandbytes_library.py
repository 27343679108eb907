"""bitsandbytes' compiled library, imported without advice that does not concern its caller."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["bitsandbytes_library"]

#: At import on some CPUs: a kernel for bitsandbytes' own layers is not installed.
_LOGGER, _ADVICE = "bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"


def bitsandbytes_library() -> Any:
    """Return the library; a placeholder if bitsandbytes comes without one."""
    logger = logging.getLogger(_LOGGER)
    logger.addFilter(_concerns_us)
    try:
        from bitsandbytes.cextension import lib
    finally:
        logger.removeFilter(_concerns_us)
    return lib


def _concerns_us(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_ADVICE)
