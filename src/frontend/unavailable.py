"""Fields that the contract has and Shoal does not honour: values that ask for nothing pass, others are refused."""

from shoal.errors import RequestError
from shoal.frontend.schemas.base import RequestBody, neutral_values


def refuse_unavailable(body: RequestBody, where: str) -> None:
    """Refuses, at any depth, what is declared and not available."""
    for name, values in neutral_values(type(body)).items():
        value = getattr(body, name)
        if value is not None and value not in values:
            raise RequestError(
                400, f"{where}{name}: not available; leave it out", param=where + name, code="not_available"
            )
    for name in body.__struct_fields__:
        value = getattr(body, name)
        items = value if isinstance(value, list) else [value]
        for number, item in enumerate(items):
            if isinstance(item, RequestBody):
                place = f"{name}[{number}]" if isinstance(value, list) else name
                refuse_unavailable(item, f"{where}{place}.")
