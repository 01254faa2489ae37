"""The fixtures for users, loaded as users do."""

from __future__ import annotations

import importlib
import sys
import textwrap

import pytest

pytest_plugins = ["pytester"]

CONFIG = """
[pytest]
asyncio_mode = {mode}
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


@pytest.fixture
def project(pytester):
    """A user's project that loads the fixtures."""
    pytester.makeconftest('pytest_plugins = ["kontext_async.testing"]')
    return pytester


def run(project, mode, source):
    project.makeini(CONFIG.format(mode=mode))
    project.makepyfile(textwrap.dedent(source))
    return project.runpytest_inprocess("-p", "no:cacheprovider")


@pytest.mark.parametrize("mode", ["auto", "strict"])
def test_a_users_test_gets_a_client_on_a_simulator(project, mode):
    result = run(
        project,
        mode,
        """
        import pytest
        from kontext_async import GenerationFailedError

        @pytest.mark.asyncio
        async def test_success(kontext_simulator, kontext_client):
            task_id = kontext_simulator.add_task()
            done = await kontext_client.wait_for_result(task_id)
            assert done.result_image_url.startswith(kontext_simulator.base_url)

        @pytest.mark.asyncio
        async def test_failure(kontext_simulator, kontext_client):
            task_id = kontext_simulator.add_task(script=["generating", "failed_flagged"])
            with pytest.raises(GenerationFailedError) as caught:
                await kontext_client.wait_for_result(task_id)
            assert caught.value.error_code == 400
            assert kontext_simulator.polls(task_id) == 2
        """,
    )
    result.assert_outcomes(passed=2)


def test_every_test_has_its_own_simulator(project):
    result = run(
        project,
        "auto",
        """
        import pytest

        @pytest.mark.parametrize("time", [1, 2])
        async def test_id(kontext_simulator, time):
            kontext_simulator.add_task("the same id")
        """,
    )
    result.assert_outcomes(passed=2)


def test_a_short_task_is_polled_often(project):
    result = run(
        project,
        "auto",
        """
        import asyncio

        async def test_quick(kontext_simulator, kontext_client):
            task_id = kontext_simulator.add_task(duration=1.0)
            done = await kontext_client.wait_for_result(task_id)
            assert kontext_simulator.polls(task_id) >= 3
            assert kontext_simulator.now < 5
        """,
    )
    result.assert_outcomes(passed=1)


def test_without_pytest_asyncio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest_asyncio", None)  # as if not installed
    monkeypatch.delitem(sys.modules, "kontext_async.testing", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"kontext-async\[testing\]"):
        importlib.import_module("kontext_async.testing")
