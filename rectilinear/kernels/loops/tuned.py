"""The few choices of a plan that no bit depends on, and what ``python -m rectilinear tune`` measured of them on this machine.

It is kept beside the compiled kernels, as one of their entries is: private, whole, and with a key and a checksum. What is damaged, of
another machine or version, or could have been written by somebody else is as good as not there, and `logging` says so at DEBUG.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path

from rectilinear.kernels.runtime import cache
from rectilinear.kernels.runtime.records import record

ITEMSIZES = (4, 8)

MOST = 1 << 20
"""No choice makes sense beyond."""

_log = logging.getLogger(__name__)


@record
class Choices:
    """What the model knows least of. No sum depends on these, so they may be measured."""

    w_uses: int = 0
    """How often a line of w must be read for packing it to pay, where that is all that depends on it (see `Host.w_uses`)."""
    x_uses: int = 0
    """How many panels must use a copied or packed A, x or dz, for that to pay."""
    turns: int = 0
    """Tasks per thread, so that they finish together."""
    w_share: int = 0
    """Sixteenths of the last cache that w takes at a time, where tasks of several blocks of rows read it."""


def path(key: str) -> Path:
    """FileNotFoundError where there is no place."""
    return cache.directory() / f"tuned-{key[:32]}"


def load(key: str) -> dict[int, Choices] | None:
    """What was measured, by itemsize; None where nothing was, or it is not to be trusted. Never raises."""
    try:
        return _parsed(cache.read(path(key), bytes.fromhex(key)))
    except FileNotFoundError:
        return None
    except Exception as error:
        _log.debug("what was tuned is not used (%s): %s", key, error)
        return None


def _parsed(content: bytes) -> dict[int, Choices]:
    found = {int(itemsize): Choices(**fields) for itemsize, fields in json.loads(content).items()}
    values = [value for choices in found.values() for value in dataclasses.asdict(choices).values()]
    if set(found) != set(ITEMSIZES) or not all(type(value) is int and 1 <= value <= MOST for value in values):
        raise ValueError("it is not what this version stores")
    return found


def check(key: str) -> None:
    """OSError where nothing can be kept, or what is kept would not be trusted."""
    place = path(key)
    place = place.with_name(f"new-{place.name}")
    cache.write(place, bytes.fromhex(key), b"")
    cache.read(place, bytes.fromhex(key))
    place.unlink()


def store(key: str, choices: dict[int, Choices]) -> Path:
    """Keep what was measured. OSError where that cannot be."""
    place = path(key)
    content = json.dumps({itemsize: dataclasses.asdict(fields) for itemsize, fields in choices.items()})
    cache.write(place, bytes.fromhex(key), content.encode())
    return place


def forget(key: str) -> bool:
    """Remove what was measured; whether there was anything. OSError where it cannot be removed."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        path(key).unlink()
        return True
    return False
