"""Steps of a task's script: each makes the answer to one look. `STEPS` has them by name.

A step is a callable that takes a `Look` and returns a `Reply`. The functions here make steps;
``success``, ``failed`` and what is built on them also end the task.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import attrs

from kontext_async.models import TaskStatus
from kontext_async.simulator import replies
from kontext_async.simulator.clock import http_date
from kontext_async.simulator.replies import Delivery, Reply, envelope, http_reply, refusal
from kontext_async.simulator.tasks import UNFINISHED, Failure, Look, Step

__all__ = [
    "FAULTS",
    "STEPS",
    "StepLike",
    "as_script",
    "as_step",
    "failed",
    "generating",
    "http",
    "rate_limited",
    "redirect_elsewhere",
    "refused",
    "sent",
    "success",
]

# A step, the name of one, a reply, or the (status, headers, body) of a reply.
StepLike: TypeAlias = str | Step | Reply | tuple[int, Mapping[str, str], bytes]


def as_step(like: StepLike, named: Mapping[str, Step] | None = None) -> Step:
    """The step that ``like`` stands for; ValueError where no step has that name."""
    if isinstance(like, str):
        return _by_name(like, STEPS if named is None else named)
    if callable(like):
        return like
    reply = like if isinstance(like, Reply) else Reply(*like)
    return lambda _: reply


def _by_name(name: str, named: Mapping[str, Step]) -> Step:
    if name in named:
        return named[name]
    close = difflib.get_close_matches(name, named, n=1)
    raise ValueError(f"no step is named {name!r}" + (f"; is it {close[0]!r}?" if close else ""))


def as_script(
    script: Iterable[StepLike], named: Mapping[str, Step] | None = None
) -> Iterator[Step]:
    """A script's steps: checked at once in a sequence, as they are reached in other iterables."""
    steps = (as_step(like, named) for like in script)
    return iter(list(steps)) if isinstance(script, Sequence) else steps


def generating(**fields: Any) -> Step:
    """The record of a task that still runs, with ``fields`` of it replaced."""
    return lambda look: look.answer(**{**UNFINISHED, **fields})


def success(**fields: Any) -> Step:
    """End the task with an image; its record, with ``fields`` of it replaced."""
    return _ended(None, lambda _: fields)


def failed(
    error_code: int = 501,
    message: str = Failure().message,
    status: Literal[
        TaskStatus.CREATE_TASK_FAILED, TaskStatus.GENERATE_FAILED
    ] = TaskStatus.GENERATE_FAILED,
    **fields: Any,
) -> Step:
    """End the task without an image; its record, with ``fields`` of it replaced."""
    return _ended(Failure(error_code, message, status), lambda _: fields)


def refused(
    code: int,
    msg: str = "",
    *,
    status: int = 200,
    retry_after: float | None = None,
    data: Any = None,
) -> Step:
    """An envelope that says no with ``code``, in an HTTP answer of ``status``.

    ``retry_after`` (s) becomes a Retry-After header, rounded up to a whole second.
    """
    return as_step(refusal(code, msg, status=status, retry_after=retry_after, data=data))


def rate_limited(retry_after: float | None = None, *, status: int = 429) -> Step:
    """A refusal with code 429."""
    return refused(429, status=status, retry_after=retry_after)


def http(
    status: int,
    body: str | None = None,
    *,
    content_type: str = "text/html; charset=utf-8",
    headers: Mapping[str, str] | None = None,
) -> Step:
    """An answer that is no envelope, as a gateway gives it; ``body`` None: a page."""
    return as_step(http_reply(status, body, content_type=content_type, headers=headers))


def sent(delivery: Delivery, step: Step | None = None) -> Step:
    """The answer of ``step`` (None: what would be answered anyway), sent another way."""

    def deliver(look: Look) -> Reply:
        return attrs.evolve(step(look) if step else look.plain(), delivery=delivery)

    return deliver


def _unsent(delivery: Delivery) -> Step:
    """No HTTP answer at all: logged with status 0, and nothing is done for the request."""
    reply = Reply(status=0, delivery=delivery)
    return lambda _: reply


def _ended(failure: Failure | None, fields: Callable[[Look], Mapping[str, Any]]) -> Step:
    def step(look: Look) -> Reply:
        look.task.end(look.now, failure)
        return look.answer(**fields(look))

    return step


def _without(*names: str, step: Step) -> Step:
    """The record that ``step`` gives, with some fields missing."""

    def strip(look: Look) -> Reply:
        data = json.loads(step(look).body)["data"]
        return envelope({name: value for name, value in data.items() if name not in names})

    return strip


def _times(write: Callable[[float], Any]) -> Step:
    """Success, with the times written another way."""

    def fields(look: Look) -> Mapping[str, Any]:
        begun = look.clock.unix(look.task.created)
        ended = begun + (look.task.duration or 0.0)
        return {"createTime": write(begun), "completeTime": write(ended)}

    return _ended(None, fields)


def _response(change: Callable[[Any], Any]) -> Step:
    """Success, with the ``response`` changed."""
    return _ended(None, lambda look: {"response": change(look.record()["response"])})


def _padded(look: Look) -> Reply:
    return look.answer(padding="x" * 2 * 1024 * 1024)


def _code_in_text(look: Look) -> Reply:
    """Success, with the envelope's code as digits in a string."""
    plain = json.loads(success()(look).body)
    return attrs.evolve(envelope(None), body=json.dumps({**plain, "code": "200"}).encode())


def _failed_with_code(look: Look) -> Reply:
    """Failure, told by the envelope's code and the record alike."""
    failed()(look)
    return envelope(look.record(), code=501, msg=replies.MESSAGES[501])


def _retry_date(look: Look) -> Reply:
    until = http_date(look.clock.unix(look.now) + 2)
    return envelope(
        None, code=429, msg=replies.MESSAGES[429], status=429, headers={"Retry-After": until}
    )


def redirect_elsewhere(look: Look) -> Reply:
    """A redirect to another name of this server: who follows it is seen, and what he sends."""
    return Reply(302, {"Location": look.url.replace("127.0.0.1", "localhost", 1)})


def _plain_time(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S")


# Ways a connection fails, whatever is asked for.
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

# Statuses a gateway gives, whatever is asked for.
GATEWAY: Mapping[str, Step] = {
    **{f"html_{status}": http(status) for status in (403, 404, 429, 500, 502, 503, 504)},
    **{f"empty_{status}": http(status, "") for status in (404, 429, 500, 502, 503, 504)},
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
    **{f"http_{code}": refused(code, status=code) for code in (429, 500, 502, 503, 504)},
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
        lambda look: {
            "response": {**look.record()["response"], "originImageUrl": None},
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
    "times_plain": _times(_plain_time),
    "times_ms": _times(lambda unix: int(unix * 1000)),
    "times_ms_text": _times(lambda unix: str(int(unix * 1000))),
    "times_unreadable": _times(lambda _: "yesterday"),
    "params_broken": success(paramJson='{"prompt": "a ligh'),
    "params_null": success(paramJson=None),
    "extra_fields": success(progress="1.00", model={"name": "flux-kontext-pro"}, fallback=[]),
    "no_task_id": _without("taskId", step=success()),
    "other_task": success(taskId="somebody-elses-task"),
    "not_an_object": http(200, "[1, 2, 3]", content_type="application/json"),
    "data_text": refused(200, "success", data="pending"),
}

_BODIES: Mapping[str, Step] = {
    "gzip": lambda look: replies.gzipped(look.plain()),
    "oversized": _padded,
    "oversized_chunked": sent(replies.chunked(), _padded),
    "oversized_gzip": lambda look: replies.gzipped(_padded(look)),
    "redirect": redirect_elsewhere,
}

STEPS: Mapping[str, Step] = {**_RECORDS, **_REFUSALS, **GATEWAY, **TRANSPORT, **_BODIES}

# What one request in a thousand may meet on a bad day: asking again helps.
FAULTS: Sequence[str] = (
    "code_408",
    "code_429",
    "code_455",
    "code_500",
    "code_524",
    "http_429",
    "http_500",
    "http_502",
    "http_503",
    "http_504",
    "html_429",
    "html_500",
    "html_502",
    "html_503",
    "html_504",
    "empty_429",
    "empty_500",
    "empty_502",
    "empty_503",
    "empty_504",
    "html_200",
    "empty_200",
    "gateway_403",
    "not_visible",
    "data_null",
    "rate_limited",
    "closed",
    "closed_after",
    "not_http",
    "overrun",
    "reset",
    "reset_mid_body",
    "slow",
    "stall",
    "stall_mid_body",
    "truncated",
)
