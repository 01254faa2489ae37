"""Make the pictures of the README and the documentation, each for light and dark pages.

Runs ``kontext demo`` in a terminal of its own, and photographs its report with Chromium. Needs the
extras ``cli``, ``images``, ``report`` and ``docs``, and Chromium: ``nox -s pictures``.
"""

from __future__ import annotations

import itertools
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pyte
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme
from rich.text import Text

IMAGES = Path(__file__).parent / "images"
COLUMNS, LINES = 100, 60
THEMES: dict[str, TerminalTheme] = {"light": DEFAULT_TERMINAL_THEME, "dark": DIMMED_MONOKAI}
# Chromium's setting for `prefers-color-scheme`.
SCHEMES = {"light": "1", "dark": "0"}


def demonstrate() -> pyte.Screen:
    """Run the demo in a terminal, and return what is on its screen at the end."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
        os.execv(sys.executable, [sys.executable, "-m", "kontext_async", "demo"])  # noqa: S606
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while select.select([terminal], [], [], 120)[0]:
        try:
            stream.feed(os.read(terminal, 65536))
        except OSError:  # it has ended
            break
    os.waitpid(process, 0)
    return screen


def lines_of(screen: pyte.Screen) -> list[Text]:
    """Return the screen's lines, with their colours."""
    lines = []
    for number in range(LINES):
        cells = [screen.buffer[number][column] for column in range(COLUMNS)]
        line = Text()
        for (colour, is_bold), run in itertools.groupby(cells, lambda cell: (cell.fg, cell.bold)):
            line.append("".join(cell.data for cell in run), _style(colour, is_bold=is_bold))
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def _style(colour: str, *, is_bold: bool) -> Style:
    is_hex = re.fullmatch("[0-9a-f]{6}", colour)
    name = None if colour == "default" else f"#{colour}" if is_hex else colour
    return Style(color=name, bold=is_bold)


def draw_terminal(lines: list[Text]) -> None:
    """Write ``terminal-light.svg`` and ``terminal-dark.svg``."""
    for name, theme in THEMES.items():
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            console = Console(record=True, width=COLUMNS, file=nowhere)
            console.print(Text("$ kontext demo", "bold"))
            for line in lines:
                console.print(line, soft_wrap=True)
            console.print()  # Rich cuts off what hangs below the last line
            svg = console.export_svg(title="kontext demo", theme=theme)
            svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # from another site
            svg = svg.replace("rgba(255,255,255,0.35)", "gray")  # a frame to see on white too
        (IMAGES / f"terminal-{name}.svg").write_text(svg, encoding="utf-8")


def photograph(report: Path) -> None:
    """Write ``report-light.png`` and ``report-dark.png``."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no Chromium here: apt-get install chromium")
    for name, scheme in SCHEMES.items():
        subprocess.run(
            [
                *(chromium, "--headless", "--no-sandbox", "--hide-scrollbars"),
                *("--window-size=1280,1120", f"--blink-settings=preferredColorScheme={scheme}"),
                *(f"--screenshot={IMAGES / f'report-{name}.png'}", report.as_uri()),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )


def main() -> None:
    """Make all pictures."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        screen = demonstrate()
        (report,) = Path(folder).glob("*/demo/report.html")
        # The folder's name is an accident of this run.
        lines = [line for line in lines_of(screen) if folder not in line.plain]
        draw_terminal(lines)
        photograph(report)


if __name__ == "__main__":
    main()
