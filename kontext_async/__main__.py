"""``python -m kontext_async``: the same as ``kontext``."""

from kontext_async.cli import main

main()
