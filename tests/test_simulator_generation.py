"""Making tasks with POST …/generate."""

from __future__ import annotations

import itertools
import json
import re

import aiohttp
import pytest

from kontext_async.simulator import FixedWindow, Simulator

pytestmark = pytest.mark.virtual_time

GENERATE = "/api/v1/flux/kontext/generate"
RECORD_INFO = "/api/v1/flux/kontext/record-info"


@pytest.fixture
async def simulator():
    async with Simulator(durations=3.0) as simulator:
        yield simulator


async def post(simulator, body, key="k"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession(simulator.base_url, headers=headers) as session,
        session.post(GENERATE, data=data) as response,
    ):
        return response.status, await response.json(content_type=None)


async def test_a_good_request_makes_a_task(simulator):
    params = {"prompt": "a boat", "aspectRatio": "1:1", "unknown": 1}
    status, answer = await post(simulator, params)
    assert (status, answer["code"], answer["msg"]) == (200, 200, "success")
    task_id = answer["data"]["taskId"]
    assert list(answer["data"]) == ["taskId"]
    assert simulator.requests[-1].task_id == task_id
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session,
        session.get(simulator.base_url + RECORD_INFO, params={"taskId": task_id}) as response,
    ):
        record = (await response.json())["data"]
    assert json.loads(record["paramJson"]) == params
    assert record["successFlag"] == 0


async def test_each_task_has_an_id_of_its_own(simulator):
    ids = [(await post(simulator, {"prompt": "a"}))[1]["data"]["taskId"] for _ in range(5)]
    assert len(set(ids)) == 5
    assert all(re.fullmatch(r"fluxkontext_[0-9a-f]{32}", task_id) for task_id in ids)


GOOD = [
    {"enableTranslation": True},
    {"uploadCn": False},
    {"inputImage": "https://example.com/a.png", "safetyTolerance": 2},
    *({"aspectRatio": ratio} for ratio in ("21:9", "16:9", "4:3", "1:1", "3:4", "9:16", "16:21")),
    {"outputFormat": "png"},
    {"outputFormat": "jpeg"},
    {"promptUpsampling": True},
    {"model": "flux-kontext-max"},
    {"callBackUrl": "http://example.com/hook"},
    {"safetyTolerance": 6},
    {"watermark": "me"},
    {"prompt": "кот"},
    {"prompt": "un café, 100 % naïf!", "enableTranslation": False},
]


@pytest.mark.parametrize("params", GOOD, ids=json.dumps)
async def test_every_documented_parameter_is_accepted(simulator, params):
    assert (await post(simulator, {"prompt": "a", **params}))[1]["code"] == 200


async def test_null_stands_for_an_optional_field_that_is_not_given(simulator):
    """Public clients send ``callBackUrl: null`` each time."""
    names = ["enableTranslation", "uploadCn", "inputImage", "aspectRatio", "outputFormat"]
    names += ["promptUpsampling", "model", "callBackUrl", "safetyTolerance", "watermark"]
    for params in ({name: None} for name in names):
        assert (await post(simulator, {"prompt": "кот", **params}))[1]["code"] == 200
    params = {"prompt": "a", "inputImage": None, "safetyTolerance": 6}
    assert (await post(simulator, params))[1]["code"] == 200


BAD = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": " "}, "prompt"),
    ({"prompt": "кот", "enableTranslation": False}, "English"),
    ({"enableTranslation": "true"}, "enableTranslation"),
    ({"uploadCn": 1}, "uploadCn"),
    ({"inputImage": "a.png"}, "inputImage"),
    ({"inputImage": 5}, "inputImage"),
    ({"inputImage": "http://[::1"}, "inputImage"),
    ({"aspectRatio": "2:1"}, "aspectRatio"),
    ({"outputFormat": "webp"}, "outputFormat"),
    ({"promptUpsampling": 0}, "promptUpsampling"),
    ({"model": "flux"}, "model"),
    ({"callBackUrl": "ftp://example.com"}, "callBackUrl"),
    ({"safetyTolerance": True}, "safetyTolerance"),
    ({"safetyTolerance": "2"}, "safetyTolerance"),
    ({"watermark": 1}, "watermark"),
]


@pytest.mark.parametrize(("params", "named"), BAD, ids=str)
async def test_a_bad_parameter_is_refused_by_name(simulator, params, named):
    status, answer = await post(simulator, {"prompt": "a", **params})
    assert (status, answer["code"], answer["data"]) == (200, 422, None)
    assert named in answer["msg"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"a"', b"null", b"{}", b"\xff"], ids=str)
async def test_a_body_that_is_not_a_request_is_refused(simulator, body):
    assert (await post(simulator, body))[1]["code"] == 422


async def test_the_key_and_the_rate_limit_apply_here_too():
    async with Simulator(api_key="right", rate_limit=FixedWindow(1, 1000)) as simulator:
        codes = [
            (await post(simulator, {"prompt": "a"}, key))[1]["code"]
            for key in ("wrong", "right", "right")
        ]
    assert codes == [401, 200, 429]


async def test_a_script_answers_the_first_requests():
    script = ["code_402", "code_505", "http_500"]
    async with Simulator(generate_script=script) as simulator:
        answers = [await post(simulator, {"prompt": "a"}) for _ in range(4)]
    assert [(status, answer["code"]) for status, answer in answers] == [
        (200, 402),
        (200, 505),
        (500, 500),
        (200, 200),
    ]


async def test_a_script_may_refuse_every_request():
    async with Simulator(generate_script=itertools.repeat("code_402")) as simulator:
        assert [(await post(simulator, {"prompt": "a"}))[1]["code"] for _ in range(5)] == [402] * 5


async def test_a_task_exists_although_the_reply_is_lost():
    async with Simulator(generate_script=["truncated"]) as simulator:
        with pytest.raises(aiohttp.ClientPayloadError):
            await post(simulator, {"prompt": "a"})
        assert simulator.polls(simulator.requests[-1].task_id) == 0


@pytest.mark.parametrize(
    "params",
    [
        {"safetyTolerance": 7},
        {"safetyTolerance": -1},
        {"safetyTolerance": 3, "inputImage": "https://example.com/a.png"},
    ],
    ids=str,
)
async def test_a_tolerance_out_of_range_is_an_internal_error(simulator, params):
    """As the service answers it, and no task is created."""
    _, answer = await post(simulator, {"prompt": "a", **params})
    assert (answer["code"], answer["data"]) == (500, None)
    assert "out of range" in answer["msg"]
    assert simulator.created == []


async def test_credits_are_spent_by_tasks_alone():
    """One for each; at zero there is code 402."""
    async with Simulator(credits=2, generate_script=["code_422", "made_no_id"]) as simulator:
        codes = [(await post(simulator, {"prompt": "a"}))[1]["code"] for _ in range(5)]
        assert codes == [422, 200, 200, 402, 402]
        assert len(simulator.created) == 2


async def test_requests_to_generate_have_a_limit_of_their_own():
    async with Simulator(creation_limit=FixedWindow(2, 10.0), retry_after=True) as simulator:
        codes = [(await post(simulator, {"prompt": "a"}))[1]["code"] for _ in range(3)]
        assert codes == [200, 200, 429]
        assert len(simulator.created) == 2


async def test_some_answers_are_lost_although_the_task_is_created():
    """By the rate that is asked for; the tasks are known in order."""
    lost = 0
    async with Simulator(lost_answer_rate=0.3) as simulator:
        for _ in range(60):
            try:
                status, answer = await post(simulator, {"prompt": "a"})
            except (aiohttp.ClientError, ValueError):
                lost += 1
            else:
                lost += not (status == 200 and answer["code"] == 200 and answer["data"])
        assert len(simulator.created) == 60
    assert 8 <= lost <= 28


def test_a_rate_outside_of_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="from 0 to 1"):
        Simulator(lost_answer_rate=1.5)
