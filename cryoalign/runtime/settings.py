"""Configuration that all typed settings share."""

from __future__ import annotations

from pydantic import ConfigDict

# An unknown key is an error, so that a misspelt key does not silently keep its default.
FORBID = ConfigDict(extra="forbid", strict=False)
