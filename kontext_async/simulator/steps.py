"""Steps of a task's script: each makes the reply to one request. `STEPS` lists them by name.

A step is a callable that takes a `StepRequest` and returns a `Reply`. The functions here make
steps; ``success``, ``failed`` and those built on them also end the task.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import attrs

from kontext_async.models import TaskStatus
from kontext_async.simulator import replies
from kontext_async.simulator.replies import Delivery, Reply, envelope, http, refused
from kontext_async.simulator.tasks import UNFINISHED, Failure, Step, StepRequest

__all__ = [
    "FAULTS",
    "GATEWAY",
    "STEPS",
    "TRANSPORT",
    "StepLike",
    "as_script",
    "as_step",
    "failed",
    "generating",
    "http",
    "rate_limited",
    "redirect_to_localhost",
    "refused",
    "sent",
    "success",
]

# A step, the name of one, or the (status, headers, body) of a reply.
StepLike: TypeAlias = str | Step | tuple[int, Mapping[str, str], bytes]


def as_step(like: StepLike, named: Mapping[str, Step] | None = None) -> Step:
    """Return the step that ``like`` stands for; ValueError for an unknown name.

    Names are those of ``named``; None stands for `STEPS`.
    """
    if isinstance(like, str):
        return _by_name(like, STEPS if named is None else named)
    return like if callable(like) else Reply(*like)


def _by_name(name: str, named: Mapping[str, Step]) -> Step:
    if name in named:
        return named[name]
    close = difflib.get_close_matches(name, named, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"there is no step {name!r}{hint}")


def as_script(
    script: Iterable[StepLike], named: Mapping[str, Step] | None = None
) -> Iterator[Step]:
    """Return a script's steps. Those of a sequence are checked now, others as they are reached."""
    steps = (as_step(like, named) for like in script)
    return iter(list(steps)) if isinstance(script, Sequence) else steps


def generating(**fields: Any) -> Step:
    """Reply with the record of a running task, some of its ``fields`` replaced."""
    return lambda request: request.record_reply(**{**UNFINISHED, **fields})


def success(**fields: Any) -> Step:
    """End the task with an image; reply with its record, some of its ``fields`` replaced."""
    return _ended(None, lambda _: fields)


def failed(
    error_code: int = 501,
    message: str = Failure().message,
    status: Literal[
        TaskStatus.CREATE_TASK_FAILED, TaskStatus.GENERATE_FAILED
    ] = TaskStatus.GENERATE_FAILED,
    **fields: Any,
) -> Step:
    """End the task without an image; reply with its record, some of its ``fields`` replaced."""
    return _ended(Failure(error_code, message, status), lambda _: fields)


def _ended(failure: Failure | None, fields: Callable[[StepRequest], Mapping[str, Any]]) -> Step:
    def step(request: StepRequest) -> Reply:
        request.task.end(request.now, failure)
        return request.record_reply(**fields(request))

    return step


def rate_limited(retry_after: float | None = None, *, status: int = 429) -> Reply:
    """Return a refusal with code 429."""
    return refused(429, status=status, retry_after=retry_after)


def sent(delivery: Delivery, step: Step | None = None) -> Step:
    """Send the reply of ``step``, or the default reply, in another way."""

    def deliver(request: StepRequest) -> Reply:
        reply = step(request) if step else request.default_reply()
        return attrs.evolve(reply, delivery=delivery)

    return deliver


def _unsent(delivery: Delivery) -> Reply:
    """Send no HTTP reply: the request is logged with status 0 and has no effect."""
    return Reply(status=0, delivery=delivery)


def _without(*names: str, step: Step) -> Step:
    """Remove fields from the record that ``step`` replies with."""

    def strip(request: StepRequest) -> Reply:
        data = json.loads(step(request).body)["data"]
        return envelope({name: value for name, value in data.items() if name not in names})

    return strip


def _times(write: Callable[[StepRequest, float], Any]) -> Step:
    """Succeed, with the times in another format."""

    def fields(request: StepRequest) -> Mapping[str, Any]:
        created = request.task.created
        ended = created + (request.task.duration or 0.0)
        return {"createTime": write(request, created), "completeTime": write(request, ended)}

    return _ended(None, fields)


def _milliseconds(request: StepRequest, second: float) -> int:
    return int(request.clock.unix(second) * 1000)


def _zoneless(request: StepRequest, second: float) -> str:
    return request.clock.iso(second).replace("T", " ").removesuffix("Z")


def _response(change: Callable[[Any], Any]) -> Step:
    """Succeed, with the ``response`` changed."""
    return _ended(None, lambda request: {"response": change(request.record()["response"])})


def _padded(request: StepRequest) -> Reply:
    return request.record_reply(padding="x" * 2 * 1024 * 1024)


def _code_in_text(request: StepRequest) -> Reply:
    """Succeed, with the envelope's code as a string."""
    reply = success()(request)
    return attrs.evolve(reply, body=reply.body.replace(b'"code": 200', b'"code": "200"', 1))


def _failed_with_code(request: StepRequest) -> Reply:
    """Fail, in the envelope's code and the record alike."""
    failed()(request)
    return refused(501, data=request.record())


def _retry_date(request: StepRequest) -> Reply:
    reply = rate_limited()
    date = request.clock.http_date(request.now + 2)
    return attrs.evolve(reply, headers={**reply.headers, "Retry-After": date})


def redirect_to_localhost(request: StepRequest) -> Reply:
    """Redirect to this server as ``localhost``: the log shows who follows and what they send."""
    return Reply(302, {"Location": request.url.replace("127.0.0.1", "localhost", 1)})


# Broken and unusual connections, whatever the request.
TRANSPORT: Mapping[str, Step] = {
    "reset": _unsent(replies.reset),
    "reset_mid_body": sent(replies.reset_mid_body),
    "closed": _unsent(replies.close),
    "closed_after": sent(replies.close_after),
    "stall": _unsent(replies.stall),
    "stall_mid_body": sent(replies.stall_mid_body),
    "slow": sent(replies.slow(0.1)),
    "truncated": sent(replies.truncate),
    "overrun": sent(replies.overrun),
    "not_http": _unsent(replies.garble),
    "chunked": sent(replies.chunked()),
}

_TEMPORARY = (429, 500, 502, 503, 504)

# Replies of a gateway, whatever the request.
GATEWAY: Mapping[str, Step] = {
    **{f"html_{status}": http(status) for status in (403, 404, *_TEMPORARY)},
    **{f"empty_{status}": http(status, "") for status in (404, *_TEMPORARY)},
    "gateway_403": http(403, "error code: 1010", content_type="text/plain; charset=utf-8"),
    "html_200": http(200),
    "empty_200": http(200, ""),
    "html_503_retry_after": http(503, "busy", headers={"Retry-After": "2"}),
}

_REFUSALS: Mapping[str, Step] = {
    **{
        f"code_{code}": refused(code)
        for code in (401, 402, 403, 404, 408, 422, 429, 451, 455, 500, 501, 502, 503, 504, 505, 524)
    },
    **{f"http_{code}": refused(code, status=code) for code in _TEMPORARY},
    "rate_limited": rate_limited(retry_after=2),
    "rate_limited_until": _retry_date,
    "rate_limited_in_body": rate_limited(status=200),
    "not_found": refused(422, "The record does not exist"),
    "not_visible": refused(422, "recordInfo is null"),
    "data_null": refused(200, "success"),
    "data_missing": http(200, '{"code": 200, "msg": "success"}', content_type="application/json"),
}

_RECORDS: Mapping[str, Step] = {
    "generating": generating(),
    "generating_sparse": _without(*(set(UNFINISHED) - {"successFlag"}), step=generating()),
    "success": success(),
    "success_nulls": _ended(
        None,
        lambda request: {
            "response": {**request.record()["response"], "originImageUrl": None},
            "errorMessage": None,
        },
    ),
    "success_no_url": _response(lambda urls: {**urls, "resultImageUrl": None}),
    "success_error_400": success(errorCode=400, errorMessage="flagged"),
    "success_error_0": success(errorCode=0),
    "response_text": _response(json.dumps),
    "response_empty": success(response={}),
    "response_null": success(response=None),
    "flag_text": success(successFlag="1"),
    "flag_missing": _without("successFlag", step=success()),
    "flag_unknown": success(successFlag=7),
    "code_text": _code_in_text,
    "code_501_record": _failed_with_code,
    "failed": failed(),
    "failed_create": failed(500, "Could not be created.", TaskStatus.CREATE_TASK_FAILED),
    "failed_flagged": failed(400, "The prompt was flagged as violating the content policies."),
    "failed_code_text": failed(errorCode="500"),
    "failed_code_blank": failed(errorCode=""),
    "failed_code_null": failed(errorCode=None),
    "failed_code_unknown": failed(433),
    "failed_no_message": failed(errorMessage=None),
    "times_plain": _times(_zoneless),
    "times_ms": _times(_milliseconds),
    "times_ms_text": _times(lambda request, second: str(_milliseconds(request, second))),
    "times_unreadable": _times(lambda _request, _second: "yesterday"),
    "params_broken": success(paramJson='{"prompt": "a ligh'),
    "params_null": success(paramJson=None),
    "extra_fields": success(progress="1.00", model={"name": "flux-kontext-pro"}, fallback=[]),
    "no_task_id": _without("taskId", step=success()),
    "other_task": success(taskId="somebody-elses-task"),
    "not_an_object": http(200, "[1, 2, 3]", content_type="application/json"),
    "data_text": refused(200, "success", data="pending"),
}

_BODIES: Mapping[str, Step] = {
    "gzip": lambda request: replies.gzipped(request.default_reply()),
    "oversized": _padded,
    "oversized_chunked": sent(replies.chunked(), _padded),
    "oversized_gzip": lambda request: replies.gzipped(_padded(request)),
    "redirect": redirect_to_localhost,
}

STEPS: Mapping[str, Step] = {**_RECORDS, **_REFUSALS, **GATEWAY, **TRANSPORT, **_BODIES}

# Steps that a retry gets past. They leave the task as it is.
FAULTS: Sequence[str] = (
    *(f"code_{code}" for code in (408, 429, 455, 500, 524)),
    *(f"{kind}_{status}" for kind in ("http", "html", "empty") for status in _TEMPORARY),
    *("html_200", "empty_200", "gateway_403", "not_visible", "data_null", "rate_limited"),
    *("closed", "closed_after", "not_http", "overrun", "reset", "reset_mid_body", "slow"),
    *("stall", "stall_mid_body", "truncated"),
)
