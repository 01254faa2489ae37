"""JSON Lines for programs, text for people, and exit codes for shells."""

from __future__ import annotations

import enum
import io
import json
import logging
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TextIO, TypeAlias, cast
from urllib.parse import quote

import typer
from rich.console import Console, RenderableType
from rich.style import Style
from rich.text import Text

from kontext_async.creation import SubmittedTask
from kontext_async.errors import ApiError, GenerationFailedError, KontextError, WaitTimeoutError
from kontext_async.models import CompletedTask, TaskRecord, TaskStatus
from kontext_async.outcomes import ResultOutcome, TaskOutcome

if TYPE_CHECKING:
    from kontext_async.results import SavedImage

# An outcome's image, or the error that prevented saving it; None if nothing was to be saved.
Saved: TypeAlias = "SavedImage | KontextError | None"

# Columns of a table outside a terminal: wide enough for a URL on one line.
_DEFAULT_WIDTH = 200


STYLES = {"success": "green", "failed": "red", "error": "red", "timeout": "yellow"}
_INDENT = 16  # columns of an outcome and its duration: at 60 an id of the service fits
_LINK_INDENT = 2  # of a link that has no room after the other
# Characters of a URL that stay as they are in a terminal's link.
_URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


class Exit(enum.IntEnum):
    """The command's exit codes. Where tasks end differently, the highest counts."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TIMEOUT = 3
    ERROR = 4
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


# Of a wait's outcomes, a ledger's states, and images.
_EXIT_CODES: Final[Mapping[str, Exit]] = {
    **dict.fromkeys(("success", "generating", "done", "saved"), Exit.DONE),
    "failed": Exit.FAILED,
    **dict.fromkeys(("timeout", "waiting", "unfinished"), Exit.TIMEOUT),
    **dict.fromkeys(("error", "notSaved"), Exit.ERROR),
}


def exit_code(results: Iterable[str]) -> Exit:
    """Return the exit code for these outcomes, states of a ledger, and images together."""
    return max((_EXIT_CODES[result] for result in results), default=Exit.DONE)


def classify(error: KontextError | None) -> str:
    """Return the outcome of a wait that ended with this error, or without one."""
    match error:
        case None:
            return "success"
        case GenerationFailedError():
            return "failed"
        case WaitTimeoutError():
            return "timeout"
        case _:
            return "error"


def code_of(error: KontextError) -> int | None:
    """Return the API's code for an error; None if it gave none."""
    match error:
        case GenerationFailedError(error_code=code) | ApiError(code=code):
            return code
        case _:
            return None


def message_of(error: KontextError) -> str:
    """Return an error's message; that of a failed generation is the service's."""
    return error.error_message if isinstance(error, GenerationFailedError) else str(error)


def record_line(record: TaskRecord) -> dict[str, Any]:
    """Return the fields for a task that was polled once; those that do not apply are None."""
    phase = record.status.phase
    if phase == "ready" and record.result_image_url is not None:
        return outcome_line(ResultOutcome(task_id=record.task_id, result=CompletedTask.of(record)))
    return {
        **_line(record.task_id, record, record.status),
        "outcome": "success" if phase == "ready" else phase,
        "errorCode": record.error_code,
        "message": record.error_message or None,
    }


def outcome_line(outcome: TaskOutcome, saved: Saved = None) -> dict[str, Any]:
    """Return the same fields for a task whose wait has ended."""
    error = outcome.error
    task: CompletedTask | TaskRecord | None = outcome.result
    status = TaskStatus.SUCCESS if task else None
    match error:
        case GenerationFailedError():
            task, status = error.record, error.status
        case WaitTimeoutError(last_record=TaskRecord() as record):
            task, status = record, record.status
        case _:
            pass
    line = {**_line(outcome.task_id or None, task, status), "outcome": classify(error)}
    if isinstance(saved, KontextError):
        error = saved
    elif saved is not None:
        line["file"] = str(saved.path)
    if error is not None:
        line |= {
            "error": type(error).__name__,
            "errorCode": code_of(error),
            "message": message_of(error),
        }
    return line


def submitted_line(task: SubmittedTask) -> dict[str, Any]:
    """Return the same fields for a task that was created just now."""
    fields = {"outcome": "submitted", "createTime": task.submitted_at}
    return {**_line(task.task_id, None, None), **fields}


def _line(
    task_id: str | None, task: CompletedTask | TaskRecord | None, status: TaskStatus | None
) -> dict[str, Any]:
    completed = task if isinstance(task, CompletedTask) else None
    return {
        "taskId": task_id,
        "outcome": None,
        "status": None if status is None else status.name,
        "resultImageUrl": completed and completed.result_image_url,
        "originImageUrl": task and task.origin_image_url,
        "createTime": task and task.create_time,
        "completeTime": task and task.complete_time,
        "duration": task and task.duration,
        "expiresAt": completed and completed.expires_at,
        "error": None,
        "errorCode": None,
        "message": None,
        "file": None,
    }


class OutputError(Exception):
    """Raised when standard output cannot be written, other than by a reader that closed it."""


def write_line(fields: Mapping[str, Any]) -> None:
    """Write a JSON object to standard output at once; its escapes are safe for a terminal."""
    with _open_output() as stdout:
        stdout.write(json.dumps(fields, default=_time_to_json) + "\n")
        stdout.flush()


@contextmanager
def _open_output() -> Generator[TextIO]:
    """Give standard output to write to; raise `OutputError` where that fails."""
    if sys.stdout is None:  # the command was started without one
        raise OutputError("it is closed")
    with translate_output_errors():
        yield sys.stdout


@contextmanager
def translate_output_errors() -> Generator[None]:
    """Raise `OutputError` where writing to standard output fails, as on a full disk."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(error.strerror) from error


def write_row(fields: Mapping[str, Any], prompt: str | None = None) -> None:
    """Write the same for people to a terminal, with a clickable link.

    The row begins with the prompt, if there is one, or with the task's id. What does not fit
    beside it follows below.
    """
    outcome, duration = fields["outcome"], fields["duration"]
    took = "" if duration is None else f"{duration.total_seconds():.0f} s"
    console = Console(markup=False, highlight=False, emoji=False)
    row = Text().append(f"{outcome:<9}", style=STYLES.get(outcome, ""))
    name = Text(plain(fields["taskId"] or fields["key"]))
    parts = list(_details(fields))
    if prompt is not None:
        if not fields["file"]:  # whose name has the id
            parts.insert(0, name)
        name = Text(one_line(prompt))
        name.truncate(max(console.width - _INDENT, _INDENT), overflow="ellipsis")
    row.append(f"{took:>5}  ").append(name)
    end = row.cell_len
    for part in parts:
        start = _next_stop(end)
        if start + part.cell_len <= console.width:
            row.append(" " * (start - end)).append(part)
            end = start + part.cell_len
            continue
        room = max(console.width - _INDENT, _INDENT)
        is_link = bool(part.style)
        indent = _LINK_INDENT if is_link and part.cell_len > room else _INDENT
        # A link stays whole, so that it can be copied.
        lines = [part] if is_link else list(part.wrap(console, room))
        for line in lines:
            row.append("\n" + " " * indent).append(line)
        end = indent + lines[-1].cell_len
    with _open_output():
        console.print(row, soft_wrap=True)


def _details(fields: Mapping[str, Any]) -> Iterator[Text]:
    """Yield a row's link and message, those that it has."""
    if fields["file"]:
        yield file_link(Path(fields["file"]))
    elif url := fields["resultImageUrl"]:
        yield _link(url, url)
    if fields["message"]:
        # Other messages name the code, and all name the task, which is in the row.
        code = f"{fields['errorCode']}: " if fields["outcome"] == "failed" else ""
        message = fields["message"].replace(f"task {fields['taskId']}: ", "")
        yield Text(plain(f"{code}{message}"))


def file_link(path: Path, text: str | None = None) -> Text:
    """Return a path, or another text, that opens the file where a terminal has links."""
    return _link(str(path) if text is None else text, path.absolute().as_uri())


def _link(text: str, url: str) -> Text:
    return Text(plain(text), style=Style(link=quote(url, safe=_URL_CHARACTERS)))


def _next_stop(column: int) -> int:
    """Return the tab stop after two spaces, so that ids of like lengths end alike."""
    return -(-(column + 2) // 8) * 8


def write_result(
    fields: Mapping[str, Any], *, as_json: bool = False, prompt: str | None = None
) -> None:
    """Write a task's result to standard output: for people on a terminal, otherwise as JSON.

    JSON has the request's key in place of the prompt.
    """
    if not as_json and is_for_people():
        write_row(fields, prompt)
    else:
        write_line(fields)


def is_for_people() -> bool:
    """Return True if standard output is a terminal."""
    return sys.stdout is not None and sys.stdout.isatty()


def write_for_people(shown: RenderableType) -> None:
    """Write text or tables to a terminal that is standard output."""
    with _open_output():
        Console(markup=False, highlight=False, emoji=False).print(shown)


def write_summary(tables: RenderableType, fields: Mapping[str, Any]) -> None:
    """Write tables to a terminal; elsewhere a JSON object, and the tables to standard error."""
    if is_for_people():
        write_for_people(tables)
    else:
        error_console().print(tables)
        write_line(fields)


def _time_to_json(time: datetime | timedelta) -> str | float:
    return time.isoformat() if isinstance(time, datetime) else time.total_seconds()


def plain(text: str) -> str:
    """Replace what a terminal would interpret in text from outside."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(text: str) -> str:
    """Return text from outside in one line, which a terminal would not interpret."""
    return plain(" ".join(text.split()))


class _Forgiving:
    """A stream that loses what cannot be written: messages must not stop the results."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_is_quiet = ContextVar("is_quiet", default=False)


def be_quiet(wanted: bool) -> bool:  # noqa: FBT001 - a command's option as it comes
    """Print results and wrong usage only from now on, if wanted."""
    _is_quiet.set(wanted)
    return wanted


def error_console() -> Console:
    """Return a console on standard error that shows text as it is, without markup."""
    stderr: TextIO | None = sys.stderr  # None if the command was started without one
    stream = io.StringIO() if stderr is None else stderr
    terminal = stream.isatty()
    return Console(
        file=cast("TextIO", _Forgiving(stream)),
        quiet=_is_quiet.get(),
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=terminal,  # against FORCE_COLOR: log files get no cursor movements
        width=None if terminal else _DEFAULT_WIDTH,
    )


def say(text: str, *, is_copied: bool = False) -> None:
    """Print a message to standard error, broken between words where a terminal ends.

    ``is_copied``: it holds a command, and stays one line.
    """
    console = error_console()
    console.print(plain(text), soft_wrap=is_copied or not console.is_terminal)


def say_where(what: str, path: Path) -> None:
    """Print a path to standard error, as a link and on one line."""
    error_console().print(Text(f"{what}: ").append(file_link(path)), soft_wrap=True)


def is_one_terminal() -> bool:
    """Return True if results and messages go to a terminal: results say what went wrong."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


def log_polls(wanted: bool) -> None:  # noqa: FBT001 - a command's option as it comes
    """Log each poll to standard error, if wanted; the progress names trouble anyway."""
    if wanted:
        log_events(logging.DEBUG)
    else:
        log = logging.getLogger("kontext_async")
        log.handlers = log.handlers or [logging.NullHandler()]


def is_logging_polls() -> bool:
    """Return True if each poll is logged to standard error."""
    return logging.getLogger("kontext_async").isEnabledFor(logging.DEBUG)


def log_events(level: int) -> None:
    """Log to standard error from this level on."""
    handler = logging.StreamHandler(cast("TextIO", _Forgiving(sys.stderr or io.StringIO())))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("kontext_async")
    log.setLevel(level)
    log.handlers = [handler]


def fail(problem: str) -> NoReturn:
    """Exit because of wrong usage; nothing has been sent."""
    console = error_console()
    console.quiet = False
    for line in f"kontext: {problem}".split("\n"):
        console.print(plain(line), soft_wrap=not console.is_terminal)
    raise typer.Exit(Exit.USAGE)


def drop_lost_messages() -> None:
    """Silence standard error if it cannot be written: the interpreter's flush would fail too."""
    stderr: TextIO | None = sys.stderr
    if stderr is None:
        return
    try:
        stderr.flush()
    except OSError:
        silence(stderr)


def silence(stream: TextIO) -> None:
    """Redirect a stream that cannot be written, so that the interpreter's flush succeeds."""
    with Path(os.devnull).open("wb") as nowhere, suppress(AttributeError, OSError, ValueError):
        os.dup2(nowhere.fileno(), stream.fileno())
