"""The request that creates a task: its parameters, and the verdict on each way it can end."""

from __future__ import annotations

import difflib
import enum
import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, Self, TypeAlias, cast, get_args
from urllib.parse import urlsplit

import attrs
from attrs.validators import optional

from kontext_async.errors import (
    ApiError,
    ConfigurationError,
    InvalidRequestError,
    KontextError,
    ResponseFormatError,
    SubmissionUnknownError,
    TaskNotFoundError,
)
from kontext_async.wire.envelope import MAX_BODY, Answer, read_answer
from kontext_async.wire.json_values import is_array, is_object, parse
from kontext_async.wire.records import foreign_task_id
from kontext_async.wire.redaction import ApiKey

__all__ = [
    "CREATION_POLICY",
    "GENERATE",
    "LOST",
    "NOT_SENT",
    "UNTRUSTED",
    "Action",
    "Creation",
    "CreationRule",
    "ImageRequest",
    "Verdict",
    "read_creation",
    "rule_of",
]

GENERATE: Final = "/api/v1/flux/kontext/generate"
"""The path that creates a task."""

Model: TypeAlias = Literal["flux-kontext-pro", "flux-kontext-max"]
AspectRatio: TypeAlias = Literal["21:9", "16:9", "4:3", "1:1", "3:4", "9:16", "16:21"]
OutputFormat: TypeAlias = Literal["jpeg", "png"]

_API_NAMES: Final[Mapping[str, str]] = {
    "prompt": "prompt",
    "input_image": "inputImage",
    "model": "model",
    "aspect_ratio": "aspectRatio",
    "output_format": "outputFormat",
    "safety_tolerance": "safetyTolerance",
    "enable_translation": "enableTranslation",
    "prompt_upsampling": "promptUpsampling",
    "upload_cn": "uploadCn",
    "watermark": "watermark",
}
_CALLBACK: Final = "callBackUrl"
_OWN_NAMES: Final = {api_name: name for name, api_name in _API_NAMES.items()}
_KNOWN: Final = (*_OWN_NAMES, _CALLBACK)
_LOWER: Final = {name.lower(): name for name in _KNOWN}

# What the API answers to an edit or a generation with another tolerance may have been paid for.
_MAX_TOLERANCE: Final = 6
_MAX_EDIT_TOLERANCE: Final = 2


def _text(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(f"{attribute.name} must be text that is not blank")


def _boolean(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigurationError(f"{attribute.name} must be True, False or None, not {value!r}")


def _one_of(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    choices = _CHOICES[attribute.name]
    if value not in choices:
        raise ConfigurationError(
            f"{attribute.name} must be one of {', '.join(choices)}, not {value!r}"
        )


_CHOICES: Final[Mapping[str, Sequence[str]]] = {
    "model": get_args(Model),
    "aspect_ratio": get_args(AspectRatio),
    "output_format": get_args(OutputFormat),
}


def _image_url(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    problem = "input_image must be a public http(s) URL, without a user and a password"
    if not isinstance(value, str) or not value.isprintable() or " " in value:
        raise ConfigurationError(problem)
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ConfigurationError(problem) from None  # its message would quote the URL
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise ConfigurationError(problem)


def _tolerance(request: ImageRequest, attribute: attrs.Attribute[Any], value: object) -> None:
    highest = _MAX_TOLERANCE if request.input_image is None else _MAX_EDIT_TOLERANCE
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= highest:
        what = "a generation" if request.input_image is None else "an edit"
        raise ConfigurationError(
            f"safety_tolerance must be a whole number from 0 to {highest} for {what}, not {value!r}"
        )


def _extra(instance: object, attribute: attrs.Attribute[Any], value: Mapping[str, Any]) -> None:
    for name in value:
        if not isinstance(name, str):
            raise ConfigurationError("extra must have names that are text")
        if name in _KNOWN:
            raise ConfigurationError(f"extra must not have {name!r}: it has an argument of its own")
        _refuse_misspelt(name)
        if value[name] is None:
            raise ConfigurationError(f"extra must not have None, as {name!r} does: leave it out")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigurationError("extra must hold values that JSON has") from exc


def _as_dict(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"extra must be a mapping, not {type(value).__name__}")
    return dict(cast("Mapping[str, Any]", value))


@attrs.frozen(kw_only=True)
class ImageRequest:
    """The parameters of an image to generate, or to edit if there is an ``input_image``.

    - ``prompt``: in English unless ``enable_translation``.
    - ``input_image``: a public http(s) URL.
    - ``aspect_ratio``: an edit without one keeps the ratio of its input.
    - ``safety_tolerance``: 0 to 6, for an edit 0 to 2.
    - ``extra``: fields that this class does not know, sent as they are.

    What is None is not sent, and the API's default applies.

    Prompt, input and extra are private, and not in ``repr``. Raises `ConfigurationError` for a
    value that the API would refuse, before anything is paid for.
    """

    prompt: str = attrs.field(repr=False, validator=_text)
    input_image: str | None = attrs.field(default=None, repr=False, validator=optional(_image_url))
    model: Model | None = attrs.field(default=None, validator=optional(_one_of))
    aspect_ratio: AspectRatio | None = attrs.field(default=None, validator=optional(_one_of))
    output_format: OutputFormat | None = attrs.field(default=None, validator=optional(_one_of))
    safety_tolerance: int | None = attrs.field(default=None, validator=optional(_tolerance))
    enable_translation: bool | None = attrs.field(default=None, validator=optional(_boolean))
    prompt_upsampling: bool | None = attrs.field(default=None, validator=optional(_boolean))
    upload_cn: bool | None = attrs.field(default=None, validator=optional(_boolean))
    watermark: str | None = attrs.field(default=None, validator=optional(_text))
    extra: Mapping[str, Any] = attrs.field(
        factory=dict[str, Any], converter=_as_dict, repr=False, hash=False, validator=_extra
    )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Return the request in a mapping with the API's own names.

        Null reads as absent. An unknown name goes to ``extra``, unless it looks like a known one.
        Raises `ConfigurationError` for a mapping that makes no request.
        """
        if not isinstance(fields, Mapping):
            raise ConfigurationError(f"expected a mapping, not {type(fields).__name__}")
        if fields.get(_CALLBACK) is not None:
            raise ConfigurationError(f"{_CALLBACK} is the client's: see callback_url")
        given = {name: value for name, value in fields.items() if value is not None}
        known = {_OWN_NAMES[name]: given.pop(name) for name in _OWN_NAMES if name in given}
        if "prompt" not in known:
            raise ConfigurationError("a request needs a prompt")
        return cls(**known, extra=given)

    def to_json(self) -> dict[str, Any]:
        """Return the parameters with the API's own names, without those that are None."""
        known = {api_name: getattr(self, name) for name, api_name in _API_NAMES.items()}
        return {**{name: v for name, v in known.items() if v is not None}, **self.extra}


def _refuse_misspelt(name: str) -> None:
    """Raise `ConfigurationError` for a name that is nearly a known one."""
    letters = name.replace("_", "").replace("-", "").lower()
    if close := difflib.get_close_matches(letters, _LOWER, 1, 0.85):
        known = _LOWER[close[0]]
        raise ConfigurationError(f"{name[:80]!r} is not a field: did you mean {known!r}?")


class Verdict(enum.Enum):
    """The certainty about a task after the request for it."""

    NOT_SENT = "not sent"
    REFUSED = "refused"
    ACCEPTED = "accepted"
    UNKNOWN = "unknown"


class Action(enum.Enum):
    """The client's action after a verdict."""

    RETRY = "sends it again with backoff for `submit_grace` seconds, then raises `TransportError`"
    RAISE = "raises the error"
    RAISE_AND_STOP = "raises the error; a batch creates no more, and goes on waiting"
    PAUSE_CREATIONS = "pauses creations, and sends it again for `submit_grace` seconds"
    PAUSE_CLIENT = "pauses the whole client, and sends it again for `submit_grace` seconds"
    WAIT = "waits for the task"
    RAISE_UNKNOWN = "raises `SubmissionUnknownError`, and never sends it again by itself"


@attrs.frozen(kw_only=True)
class CreationRule:
    """A row of `CREATION_POLICY`.

    ``codes`` are those of an envelope, ``statuses`` those of an HTTP answer without one.
    """

    came: str
    verdict: Verdict
    action: Action
    codes: Container[int] = ()
    statuses: Container[int] = ()


NOT_SENT: Final = CreationRule(
    came="DNS, connect, TLS, a proxy, a full pool, a timeout: all before the hand-over",
    verdict=Verdict.NOT_SENT,
    action=Action.RETRY,
)
UNTRUSTED: Final = CreationRule(
    came="a certificate that does not verify",
    verdict=Verdict.NOT_SENT,
    action=Action.RAISE,
)
_ACCEPTED: Final = CreationRule(
    came="a `taskId`, in any envelope, even in an answer that broke off after it",
    verdict=Verdict.ACCEPTED,
    action=Action.WAIT,
)
LOST: Final = CreationRule(
    came="anything else after the hand-over: 408, 500, 501, 5xx, 303, an answer without an id, "
    "a connection that was closed or reset, a timeout",
    verdict=Verdict.UNKNOWN,
    action=Action.RAISE_UNKNOWN,
)

CREATION_POLICY: Final[tuple[CreationRule, ...]] = (
    NOT_SENT,
    UNTRUSTED,
    _ACCEPTED,
    CreationRule(
        came="429",
        verdict=Verdict.REFUSED,
        action=Action.PAUSE_CREATIONS,
        codes={429},
        statuses={429},
    ),
    CreationRule(
        came="455",
        verdict=Verdict.REFUSED,
        action=Action.PAUSE_CLIENT,
        codes={455},
        statuses={455},
    ),
    CreationRule(
        came="401, 402, and an envelope with 433 or 505",
        verdict=Verdict.REFUSED,
        action=Action.RAISE_AND_STOP,
        codes={401, 402, 433, 505},
        statuses={401, 402},
    ),
    CreationRule(
        came="an envelope with 403, 404 or 422; any 4xx without an envelope, except 408; "
        "301, 302, 307, 308",
        verdict=Verdict.REFUSED,
        action=Action.RAISE,
        codes={403, 404, 422},
        statuses={301, 302, 307, 308, *range(400, 408), *range(409, 500)},
    ),
    LOST,
)
"""Each way a request to create a task can end, the verdict, and the client's action.

The first row that fits counts. *Hand-over* is the moment before the request's first byte.
"""


@attrs.frozen
class Creation:
    """The end of one request: the rule that fits, and the new task's id or the error."""

    rule: CreationRule
    task_id: str | None = None
    error: KontextError | None = None


def read_creation(
    status: int,
    headers: Mapping[str, str],
    body: bytes,
    *,
    broken_off: str | None,
    request: ImageRequest,
    api_key: ApiKey,
    now: float,
) -> Creation:
    """Judge an answer to the request for a task.

    ``broken_off`` says why the answer is not whole; None if it is. Neither the error nor the id
    holds the key or the prompt. ``now`` is the unix time.
    """
    task_id = _task_id(body, is_whole=broken_off is None)
    if task_id is not None and api_key.redact(task_id) == task_id:
        return Creation(_ACCEPTED, task_id)
    if broken_off is not None:
        return Creation(LOST, error=SubmissionUnknownError(broken_off, http_status=status))
    try:
        answer = read_answer(status, headers, body, task_id=None, api_key=api_key, now=now)
    except ResponseFormatError as error:
        return Creation(LOST, error=SubmissionUnknownError(str(error.args[0]), http_status=status))
    refusal = _refusal(answer, request)
    rule = rule_of(refusal.code, from_gateway=refusal.from_gateway)
    if rule is LOST:
        problem = f"the answer holds no task id: {refusal.msg}"
        unknown = SubmissionUnknownError(problem, code=answer.code, http_status=status)
        return Creation(rule, error=unknown)
    return Creation(rule, error=refusal)


def rule_of(code: int, *, from_gateway: bool) -> CreationRule:
    """Return the rule for a code of an envelope, or for the HTTP status of another answer."""
    for rule in CREATION_POLICY:
        if code in (rule.statuses if from_gateway else rule.codes):
            return rule
    return LOST


def _refusal(answer: Answer, request: ImageRequest) -> ApiError:
    """Return the error for an answer without a task, without the words of the request."""
    error = answer.refusal()
    msg = error.msg if isinstance(error, ApiError) else str(error.args[0])
    msg = _without_private(msg, request)
    if isinstance(error, ApiError) and not isinstance(error, TaskNotFoundError):
        error = error.for_task(None, msg=msg)
        error.args = (msg,)
        return error
    return (InvalidRequestError if answer.code == 422 else ApiError)(
        msg,
        code=answer.status if answer.code is None else answer.code,
        http_status=answer.status,
        from_gateway=answer.code is None,
    )


# A key whose quotes are not escaped, so that it is not within a string; and a whole string.
_TASK_ID: Final = re.compile(r'(?<!\\)"taskId"\s*:\s*("(?:[^"\\]|\\.)*")')


def _task_id(body: bytes, *, is_whole: bool) -> str | None:
    """Return the id of the new task in an answer, also in one that broke off."""
    text = body[:MAX_BODY].decode("utf-8-sig", errors="replace")
    try:
        value: Any = parse(text)
    except ValueError:
        return None if is_whole else _cut_id(text)
    if not is_object(value):
        return None
    data = value.get("data")
    return foreign_task_id(data.get("taskId") if is_object(data) else value.get("taskId"))


def _cut_id(text: str) -> str | None:
    found = _TASK_ID.search(text)
    try:
        return None if found is None else foreign_task_id(json.loads(found[1], strict=False))
    except ValueError:
        return None


_RUN: Final = 12  # characters in common with a private text that are hidden


def _without_private(text: str, request: ImageRequest) -> str:
    """Hide what a text of the service repeats of the prompt and of the other private fields."""
    private = [
        request.prompt,
        request.input_image,
        request.watermark,
        *_strings(dict(request.extra)),
    ]
    for secret in filter(None, private):
        text = _without(text, secret)
    return text


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif is_object(value):
        for member in value.values():
            yield from _strings(member)
    elif is_array(value):
        for item in value:
            yield from _strings(item)


def _without(text: str, secret: str) -> str:
    """Hide a secret in a text, and each longer run of characters that they have in common."""
    if len(secret) <= _RUN:
        return text.replace(secret, "…") if len(secret) > 2 else text
    runs = {secret[at : at + _RUN] for at in range(len(secret) - _RUN + 1)}
    hidden = [False] * len(text)
    for at in range(len(text) - _RUN + 1):
        if text[at : at + _RUN] in runs:
            hidden[at : at + _RUN] = [True] * _RUN
    shown = "".join("\0" if hide else c for c, hide in zip(text, hidden, strict=True))
    return re.sub("\0+", "…", shown)
