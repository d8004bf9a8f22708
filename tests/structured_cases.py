"""Schemas, as `response_format` has them."""

from __future__ import annotations

import random
from functools import partial
from typing import Any


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Whose values are short, so that a model that is not made for JSON comes to their end."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "any"]
    kind = rng.choice(["object", "object", "array", *kinds] if depth < 3 else kinds)
    deeper = partial(random_schema, rng, depth + 1)
    match kind:
        case "object":
            names = rng.sample(["a", "name", "größe", 'q"uote', "x y", "box", "colour"], rng.randint(0, 4))
            required = [name for name in names if rng.random() < 0.7]
            properties = {name: deeper() for name in names}
            return {
                "type": "object",
                "properties": properties,
                "required": required,
                "additionalProperties": False,
            }
        case "array":
            least = rng.randint(0, 2)
            return {
                "type": "array",
                "items": deeper(),
                "minItems": least,
                "maxItems": least + rng.randint(0, 2),
            }
        case "string":
            least = rng.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
        case "integer":
            least = rng.randint(-50, 50)
            return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 900)}
        case "number":
            return {"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25}
        case "enum":
            return {"enum": rng.sample(["red", "blue", 3, None, True, "two words", -1.5], rng.randint(1, 4))}
        case "const":
            return {"const": rng.choice(["fixed", 7, False, {"k": [1, 2]}])}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[A-Z]{2}[0-9]{1,3}$", "^(ab|cd){1,2}$"])}
        case "any":
            return {"anyOf": [deeper(), deeper()]}
    return {"type": kind}
