"""How API types are declared: camelCase on the wire, closed, immutable, and each rule written once.

A :class:`Rule` says the same thing twice on purpose, side by side: as CEL, which the API server enforces at admission, and
as a Python predicate, which the trainer and the command line enforce on the same document without a cluster. One table
of wrong manifests runs against both, so they cannot drift apart unnoticed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)
from pydantic.alias_generators import to_camel

from finetune_api.quantity import quantity_value

VALIDATIONS = "x-kubernetes-validations"
# Marks (in json_schema_extra) a default that programs fill in and the API server does not. For a choice of one of several fields that may
# change later: a stored default would stay beside the field that a user sets instead, and the two would be refused.
DEFAULT_NOT_STORED = "x-default-not-stored"


@dataclass(frozen=True, slots=True)
class Rule:
    """One admission rule of a type.

    ``transition`` rules compare an update with the old object; only the API server can see that, so they carry no check.
    """

    cel: str | None
    """None when the schema itself says it (the keys of a list map)."""
    message: str
    check: Callable[[Any], bool] | None = None
    field: str | None = None

    def as_schema(self) -> dict[str, Any]:
        """Return the rule as an entry of ``x-kubernetes-validations``."""
        assert self.cel is not None
        schema: dict[str, Any] = {"rule": self.cel, "message": self.message}
        if self.field is not None:
            schema["fieldPath"] = f".{self.field}"
        return schema


class ApiModel(BaseModel):
    """A closed, immutable API object. Raises ``ValidationError`` naming the field for anything the API does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # errors are logged, and what was written may be a secret
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _follow_rules(self) -> Self:
        for rule in self.rules:
            if rule.check is not None and not rule.check(self):
                where = f"{rule.field}: " if rule.field else ""
                raise ValueError(f"{where}{rule.message}")
        return self

    def to_wire(self) -> dict[str, Any]:
        """Return the object as plain JSON values under its wire names, without fields that are unset (``None``)."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class StatusModel(ApiModel):
    """An object of status. Open to fields it does not know, so that an older operator reads what a newer one wrote."""

    model_config = ConfigDict(extra="ignore")


def matching(pattern: str, message: str, *, max_length: int, min_length: int = 1) -> Any:
    """Return a string type that must match ``pattern`` (RE2 syntax, anchored), refused with ``message`` otherwise.

    A CEL rule rather than the schema's own ``pattern``, whose refusal shows users a regular expression.
    """
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(message)
        return value

    quoted = pattern.replace("\\", "\\\\").replace("'", "\\'")
    rule = Rule(cel=f"self.matches('^(?:{quoted})$')", message=message)
    return Annotated[
        str,
        StringConstraints(min_length=min_length, max_length=max_length),
        AfterValidator(check),
        Field(json_schema_extra={VALIDATIONS: [rule.as_schema()]}),
    ]


_POSITIVE = r"(?:[0-9]*[1-9][0-9]*(?:\.[0-9]+)?|[0-9]+\.[0-9]*[1-9][0-9]*)"


_LONGEST_INTEGER = 2**63 - 1  # the API server reads a longer one as a number with a fraction


def _quantity_as_text(value: object) -> object:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value > _LONGEST_INTEGER:
        raise ValueError(f"integers are at most {_LONGEST_INTEGER}")
    return str(value)


def quantity(suffix: str, message: str, *, between: tuple[str, str] | None = None) -> Any:
    """Return a type of positive quantities, ``between`` two of them if so; written without quotes they come as integers."""
    pattern = re.compile(f"^{_POSITIVE}{suffix}$")
    least, most = (int(quantity_value(bound)) for bound in between) if between else (None, None)

    def check(value: str) -> str:
        if pattern.fullmatch(value) is None:
            raise ValueError(message)
        if least is not None and most is not None and not least <= quantity_value(value) <= most:
            raise ValueError(message)
        return value

    number, text = "self > 0", "self.matches('{}')".format(pattern.pattern.replace("\\", "\\\\"))
    if between is not None:
        number = f"self >= {least} && self <= {most}"
        text += f" && quantity(self).compareTo(quantity('{between[0]}')) >= 0"
        text += f" && quantity(self).compareTo(quantity('{between[1]}')) <= 0"
    cel = f"type(self) == int ? {number} : {text}"
    return Annotated[
        str,
        BeforeValidator(_quantity_as_text),
        StringConstraints(max_length=32),
        AfterValidator(check),
        WithJsonSchema(
            {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True,
                "maxLength": 32,
                VALIDATIONS: [Rule(cel=cel, message=message).as_schema()],
            }
        ),
    ]


# A path segment starts with a letter, a digit or an underscore: that alone refuses "..", ".", "//" and encodings.
SEGMENT = "[A-Za-z0-9_][A-Za-z0-9_.=+,@-]*"
BUCKET = "[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
DNS_LABEL = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
IN_S3 = f"s3://{BUCKET}(/{SEGMENT})+"
IN_CLAIM = f"pvc://{DNS_LABEL}(/{SEGMENT})+"
IN_IMAGE = f"file://(/{SEGMENT})+"
IN_HUB = f"hf://{SEGMENT}/{SEGMENT}"

ModelUri = matching(
    f"{IN_S3}|{IN_CLAIM}|{IN_IMAGE}|{IN_HUB}",
    "must be s3://bucket/path, pvc://claim/path, file:///path or hf://organisation/name@revision; path segments start with"
    " a letter, digit or underscore ('..', '//', '%' and spaces are refused)",
    max_length=1024,
)
DataUri = matching(
    f"({IN_S3}|{IN_CLAIM}|{IN_IMAGE})\\.(jsonl|csv|parquet)",
    "must be s3://bucket/path, pvc://claim/path or file:///path ending in .jsonl, .csv or .parquet; path segments start"
    " with a letter, digit or underscore ('..', '//', '%' and spaces are refused)",
    max_length=1024,
)
StorageUri = matching(
    f"s3://{BUCKET}(/{SEGMENT})*",
    "must be s3://bucket or s3://bucket/path without a trailing slash; path segments start with a letter, digit or"
    " underscore ('..', '//', '%' and spaces are refused)",
    max_length=512,
)
CheckpointUri = matching(
    f"s3://{BUCKET}(/[A-Za-z0-9_][A-Za-z0-9_.=+,-]*)+(@[0-9]{{1,9}})?",
    "must be s3://bucket/prefix-of-another-job (its uri/namespace/name-uid8), with @step for a certain step; path segments start with a"
    " letter, digit or underscore ('..', '//', '%' and spaces are refused)",
    max_length=1024,
)
ObjectName = matching(
    DNS_LABEL + f"(\\.{DNS_LABEL})*",
    "must be the name of a Kubernetes object: lower-case letters, digits, '-' and '.'",
    max_length=253,
)
EndpointUrl = matching(
    "https?://[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{1,5})?",
    "must be http://host[:port] or https://host[:port], without user, path or query",
    max_length=512,
)
EnvironmentName = matching(
    "[A-Za-z_][A-Za-z0-9_]*",
    "must be a letter or underscore followed by letters, digits and underscores",
    max_length=256,
)
_IMAGE_PATH = "[a-z0-9]+([._-]+[a-z0-9]+)*"
ImageReference = matching(
    f"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]{{1,5}})?/)?{_IMAGE_PATH}(/{_IMAGE_PATH})*"
    "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[a-z0-9]+:[0-9a-f]{32,128})?",
    "must be an image reference such as registry/name:tag or registry/name@sha256:digest",
    max_length=512,
)
Line = matching("[^\\x00-\\x1f\\x7f]+", "must be one line of text without control characters", max_length=256)
Cores = quantity("m?", "must be a positive number of cores such as 4, '0.5' or 500m")
Bytes = quantity("(?:[kMGTP]|[KMGTP]i)?", "must be a positive number of bytes such as 512Mi, 64Gi or 1T")
StagingMemory = quantity(
    "(?:[kMGTP]|[KMGTP]i)?",
    "must be a number of bytes such as 512Mi or 64Gi, at least 1Mi and at most 4Ti",
    between=("1Mi", "4Ti"),
)
ByteRate = quantity(
    "(?:[kMGTP]|[KMGTP]i)?",
    "must be a number of bytes per second such as 100Mi or 2G, at least 1Mi and at most 1Ti",
    between=("1Mi", "1Ti"),
)
