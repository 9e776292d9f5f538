"""JSON that every reader takes: no NaN and no infinity, which Python writes and the standard does not have."""

from __future__ import annotations

import json
import math
from typing import Any


def finite(content: Any) -> Any:
    """Return JSON-able content with null in the place of floats that are not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return content


def dumps(content: Any, **arguments: Any) -> str:
    """Return `json.dumps` of content with null in the place of floats that are not finite."""
    # DEL is the one control character that json leaves as it is
    return json.dumps(finite(content), allow_nan=False, **arguments).replace("\x7f", "\\u007f")
