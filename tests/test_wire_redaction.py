"""The API key and the prompt are in nothing that is shown of an answer."""

from __future__ import annotations

import html
import json

import pytest
from wire_answers import KEY, PROMPT, RESULT, decode, leaks, outcome_of, refusal, success

from kontext_async.wire.envelope import read_answer
from kontext_async.wire.redaction import ApiKey

# The excerpt.


def test_an_excerpt_is_short_and_printable():
    error = refusal(b"\x1b[2J\0\r\n" + b"x" * 5000)
    assert len(error.excerpt) == 200
    assert error.excerpt.isprintable()


@pytest.mark.parametrize(
    "body",
    [
        success(successFlag=9),
        {"code": 200, "data": [{"deep": {"paramJson": PROMPT}}]},
        {"code": 200, "data": {"response": json.dumps({"paramJson": PROMPT})}},
        {"code": 200, "data": {"response": json.dumps({"a": json.dumps({"paramJson": PROMPT})})}},
        {"paramJson": {"prompt": PROMPT}},
        {"request.paramJson": {"prompt": PROMPT}},
        json.dumps(success())[:-1].encode(),
        b"got: " + json.dumps(json.dumps(success())).encode(),
        b'{"p\\u0061ramJson": "' + PROMPT.encode() + b'", "data": ',
        b'{"p\\u0061ramJson": "' + PROMPT.encode() + b'"}',
        b"\xff" + json.dumps(success()).encode(),
    ],
    ids=lambda body: repr(body)[:40],
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_no_prompt_gets_into_an_excerpt(body, status):
    error = refusal(body, status)
    seen = f"{error} {error!r} {vars(error)}"
    assert "lighthouse" not in seen
    assert "prompt" not in seen


def test_an_excerpt_keeps_the_rest_of_what_held_the_parameters():
    error = refusal({"paramJson": PROMPT, "successFlag": 1})
    assert error.excerpt == '{"successFlag": 1}'


@pytest.mark.parametrize(
    ("depth", "shown"), [(100_000, '[[[[[[["…"]]]]]]]}'), (200_000, "[" * 178)]
)
def test_an_answer_nested_too_deeply_for_the_parser_is_shown_by_its_beginning(depth, shown):
    error = refusal(b'{"code": 200, "data": ' + b"[" * depth + b"]" * depth + b"}")
    assert error.excerpt == '{"code": 200, "data": ' + shown


def test_an_excerpt_shows_eight_levels_of_a_deep_answer():
    deep = {"code": 200, "data": [[[[[[[[[[{"paramJson": PROMPT}]]]]]]]]]]}
    assert refusal(deep).excerpt == '{"code": 200, "data": [[[[[[["…"]]]]]]]}'
    deep = {"code": 200, "data": {"1": {"2": {"3": {"4": {"5": {"6": {"7": {"8": 9}}}}}}}}}
    assert '{"7": "…"}' in refusal(deep).excerpt


# The key.


def spelled(text, how):
    """Return a text in one of its spellings, as it stands between the quotes of JSON."""
    if how == "plain":
        return json.dumps(text)[1:-1]
    if how == "slashes":
        return json.dumps(text)[1:-1].replace("/", "\\/")
    if how == "one":
        return f"\\u{ord(text[0]):04x}" + json.dumps(text[1:])[1:-1]
    return "".join(f"\\u{ord(c):04X}" for c in text)


@pytest.mark.parametrize("how", ["plain", "slashes", "one", "all"])
@pytest.mark.parametrize("key", [KEY, 'quo"te\\and/slash', "0123456789", 'dGhl+/"'])
@pytest.mark.parametrize(
    "place",
    [
        '{"code": 200, "data": {"successFlag": 3, "errorMessage": "bad key Bearer @"}}',
        '{"code": 200, "data": {"successFlag": 1, "response": {"resultImageUrl": "x/@"}}}',
        '{"code": 200, "data": {"successFlag": 1, "response": {"originImageUrl": "x/@"}}}',
        '{"code": 200, "data": {"successFlag": 1, "paramJson": "@"}}',
        '{"code": 200, "data": {"successFlag": 9, "@": "@"}}',
        '{"code": 401, "msg": "bad key @"}',
        '{"code": 501, "msg": "bad key @"}',
        '{"code": 200, "data": "@"}',
        '{"headers": {"Authorization": "Bearer @"}}',
        "<html>Bearer @</html>",
        '{"code": 200, "data": {"successFlag": 1, "errorMessage": "@',
    ],
)
@pytest.mark.parametrize("status", [200, 401, 502])
def test_an_echoed_key_never_comes_back(place, key, how, status):
    body = place.replace("@", spelled(key, how)).encode()
    outcome = outcome_of(body, status, api_key=key)
    assert not leaks(outcome, key)
    assert "***" in f"{outcome} {getattr(outcome, 'param_json', '')}"


@pytest.mark.parametrize("key", [KEY, "<key>'&\"/0123456789", "&lt;key&gt;"])
@pytest.mark.parametrize("status", [200, 502])
@pytest.mark.parametrize("page", ["<html>Bearer @</html>", "Bearer @", '{"Authorization": "@"}'])
def test_a_key_echoed_in_html_never_comes_back(page, key, status):
    for spelling in (html.escape(key), html.escape(key).replace("&#x27;", "&#0039;")):
        outcome = outcome_of(page.replace("@", spelling).encode(), status, api_key=key)
        assert not leaks(outcome, key)
        assert "***" in str(outcome)


@pytest.mark.parametrize("form", ["&#{};", "&#x{:x};", "&#X000{:X};"])
def test_a_key_in_numeric_references_is_not_in_the_text_of_a_page(form):
    echoed = "".join(form.format(ord(c)) for c in KEY)
    assert refusal(f"<p>Bearer {echoed}</p>".encode(), 502).msg == "Bearer ***"


def test_the_repr_of_an_answer_shows_neither_key_nor_prompt():
    body = json.dumps(success()).encode()
    answer = read_answer(200, {}, body, task_id="task12345", api_key=ApiKey(KEY), now=0.0)
    assert answer.data["taskId"] == "task12345"
    assert PROMPT not in repr(answer)
    assert KEY not in repr(answer)


def test_a_key_shows_itself_neither_in_its_repr_nor_in_its_attributes():
    key = ApiKey(KEY)
    assert key.redact(f"Bearer {key.reveal()}") == "Bearer ***"
    attributes = [repr(getattr(key, name)) for name in ApiKey.__slots__]
    assert KEY not in f"{key} {key!r} {attributes}"


@pytest.mark.parametrize("how", ["plain", "slashes", "one", "all"])
def test_a_key_echoed_within_nested_json_never_comes_back(how):
    inner = f'{{"prompt": "{spelled(KEY, how)}", "resultImageUrl": "{spelled(KEY, how)}"}}'
    record = decode(success(paramJson=inner, response=inner))
    assert record.params["prompt"] == record.result_image_url == "***"
    assert not leaks(record, KEY)
    twice = decode(success(paramJson=json.dumps({"again": inner})))
    assert json.loads(twice.params["again"])["prompt"] == "***"


def test_a_key_echoed_in_a_list_never_comes_back():
    assert decode(success(response={"resultUrls": [KEY, KEY]})).result_image_url == "***"


def test_a_key_echoed_as_a_number_is_not_in_the_excerpt():
    error = refusal(b'{"key": 9876543210}', api_key="9876543210")
    assert error.excerpt == '{"key": ***}'
    for padding in range(170, 200):
        error = refusal({"a": "." * padding, "b": 9876543210}, api_key="9876543210")
        assert "98" not in error.excerpt


def test_a_key_cut_by_the_excerpts_end_leaves_no_part_of_itself():
    for start in range(150, 205):
        error = refusal(b"." * start + KEY.encode() * 3)
        assert "sk-" not in error.excerpt


def test_a_key_of_six_characters_is_redacted():
    assert refusal(b"Bearer abcdef", 500, api_key="abcdef").msg == "Bearer ***"


def test_a_key_too_short_to_be_secret_is_not_redacted():
    record = decode(success(), api_key="task1")
    assert record.result_image_url == RESULT
    assert decode(success(), api_key="").result_image_url == RESULT
    assert decode(success(errorMessage="\u00e9"), api_key="").error_message == "\u00e9"
