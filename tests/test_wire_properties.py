"""Any bytes give a record or one of our errors, and neither holds the key."""

from __future__ import annotations

import copy
import json
import pickle
from datetime import timedelta
from email.utils import formatdate

from hypothesis import example, given, settings
from hypothesis import strategies as st
from wire_answers import KEY, PROMPT, SAMPLES, TASK, leaks, outcome_of, sample

from kontext_async.errors import KontextError
from kontext_async.models import TaskRecord, TaskStatus

RECORDS = sorted(
    path.stem for path in SAMPLES.glob("*.json") if b'"successFlag"' in path.read_bytes()
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "0", "1", "200", "501", "{}", "\ud800", KEY, TASK, PROMPT, 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
statuses = st.sampled_from([200, 204, 302, 401, 403, 404, 422, 429, 455, 500, 501, 503]) | (
    st.integers(100, 999)
)
headers = st.dictionaries(
    st.sampled_from(["Retry-After", "Date", "Location"]),
    st.text(max_size=45)
    | st.integers().map(str)
    | st.integers(0, 2**36).map(lambda t: formatdate(t, usegmt=True))
    | st.text("0123456789 :,-+()GMTadeJnWMr", max_size=40).map("Wed, 20 Mar ".__add__),
)


def paths(value, path=()):
    """Yield the path of every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else ()
    for name, child in children:
        yield from paths(child, (*path, name))


@st.composite
def mutations(draw):
    """Draw a valid reply with a few parts replaced, dropped, renamed or wrapped."""
    reply = json.loads(sample(draw(st.sampled_from(RECORDS))))
    for _ in range(draw(st.integers(1, 3))):
        *path, name = draw(st.sampled_from([path for path in paths(reply) if path]))
        parent = reply
        for step in path:
            parent = parent[step]
        value = parent.pop(name)
        match draw(st.sampled_from(["replace", "drop", "rename", "wrap"])):
            case "replace":
                parent[name] = draw(json_values)
            case "rename":
                parent[draw(st.text())] = value
            case "wrap":
                parent[name] = draw(st.sampled_from([[value], {"x": value}, json.dumps(value)]))
        if not any(paths(reply)):
            break
    return reply


def check(body, status, headers):
    """Return the outcome: a record or one of our errors, fit to print and to pickle."""
    outcome = outcome_of(body, status, headers)
    assert not leaks(outcome, KEY)
    twin = pickle.loads(pickle.dumps(outcome))
    assert (type(twin), str(twin)) == (type(outcome), str(outcome))
    if isinstance(outcome, KontextError):
        check_error(outcome)
        assert vars(twin) == vars(outcome)
    else:
        check_record(outcome)
        assert twin == outcome
    return outcome


def check_error(error):
    assert str(error).isprintable()
    assert len(getattr(error, "excerpt", "")) <= 200
    assert (getattr(error, "retry_after", None) or 0.0) >= 0.0


def check_record(record):
    assert type(record) is TaskRecord
    assert record.task_id == TASK
    assert type(record.status) is TaskStatus
    assert record.duration is None or record.duration >= timedelta(0)
    urls = [record.origin_image_url, record.result_image_url]
    for text in (*urls, record.param_json, record.error_message, str(record.params)):
        assert text is None or text.encode() is not None


@given(body=json_values, status=statuses, headers=headers)
def test_any_json_gives_a_record_or_one_of_our_errors(body, status, headers):
    check(body, status, headers)


@given(
    body=st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")),
    status=statuses,
    headers=headers,
)
def test_any_bytes_give_one_of_our_errors(body, status, headers):
    assert isinstance(check(body, status, headers), KontextError)


@given(body=mutations(), status=statuses, headers=headers)
@settings(max_examples=300)
@example(body={"code": 501, "data": None}, status=200, headers={})
def test_any_mutation_of_a_valid_reply_gives_a_record_or_one_of_our_errors(body, status, headers):
    check(body, status, headers)


@given(cut=st.integers(0, 700), junk=st.binary(max_size=8), status=statuses)
def test_a_reply_cut_short_shows_no_prompt(cut, junk, status):
    outcome = check(sample("success")[:cut] + junk, status, {})
    assert "lighthouse" not in f"{outcome} {getattr(outcome, '__dict__', '')}"


@given(data=st.data(), reply=mutations(), status=statuses)
def test_a_key_in_any_spelling_at_any_place_never_comes_back(data, reply, status):
    """`check` searches the outcome for the key."""
    marked = copy.deepcopy(reply)
    for path in [path for path in paths(marked) if path]:
        parent = marked
        for step in path[:-1]:
            parent = parent[step]
        if isinstance(parent[path[-1]], str) and data.draw(st.booleans()):
            parent[path[-1]] += "@@@"
    spelling = "".join(
        data.draw(st.sampled_from([c, f"\\u{ord(c):04x}", f"\\u{ord(c):04X}"])) for c in KEY
    )
    check(json.dumps(marked).replace("@@@", spelling).encode(), status, {})
