"""What all typed settings share."""

from __future__ import annotations

from pydantic import ConfigDict

# Settings know their keys: a misspelt one is an error, not a default.
FORBID = ConfigDict(extra="forbid", strict=False)
