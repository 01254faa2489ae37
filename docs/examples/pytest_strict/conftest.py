"""The fixtures of kontext-async, for all tests in this folder."""

pytest_plugins = ["kontext_async.testing"]
