"""A program at a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time

PROMPT = r">[ \n]*$"


class Terminal:
    """A program at a terminal of its own."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.seen = ""
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            command, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Reads until `pattern` is seen, and forgets what came up to it."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen, re.DOTALL)):
            assert time.monotonic() < end, f"waited for {pattern!r}, seen {self.seen!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    new = os.read(self._fd, 65536).decode(errors="replace")
                except OSError:  # Linux's end of file on a terminal
                    new = ""
                assert new, f"ended before {pattern!r}: {self.seen!r}"
                if "\x1b[6n" in new:
                    self.send("\x1b[1;1R")  # prompt_toolkit asks where the cursor stands
                self.seen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]|[\b\r]", "", self.seen + new)
        self.seen = self.seen[found.end() :]
        return found[0]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)

    def interrupt(self) -> None:
        self.send("\x03")
