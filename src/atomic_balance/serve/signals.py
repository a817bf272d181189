"""What signals do to a process that serves: stop it, give it new tokens, or nothing."""

import asyncio
import errno
import logging
import signal
import sys
import termios

from atomic_balance.http.authorization import Tokens
from atomic_balance.settings import Settings, WrongSettingError, with_new_tokens

log = logging.getLogger("atomic_balance")

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
_MEANT_FOR_WORKERS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)


def stop_on_signals() -> asyncio.Event:
    """An event that is set as soon as a signal asks this process to stop."""
    stop = asyncio.Event()
    for number in STOPPING:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def outlive_other_signals(settings: Settings, tokens: Tokens, stop: asyncio.Event) -> None:
    """Keep signals that are meant for a service with several workers from ending or freezing the only process.

    On SIGHUP `tokens` become those that `.env` has by then, or `stop` is set if the terminal was closed.
    """
    loop = asyncio.get_running_loop()

    def hang_up() -> None:
        nonlocal settings
        if terminal_has_gone():
            stop.set()
        elif renewed := settings_with_new_tokens(settings):
            settings = renewed
            tokens.accept(settings)

    loop.add_signal_handler(signal.SIGHUP, hang_up)
    for number in _MEANT_FOR_WORKERS:
        loop.add_signal_handler(number, log.warning, "%s is ignored: it means nothing to one process", number.name)


def settings_with_new_tokens(settings: Settings) -> Settings | None:
    """`settings` with the tokens that `.env` has now; None, and a line in the log, if anything there is wrong."""
    try:
        renewed = with_new_tokens(settings)
    except WrongSettingError as error:
        log.error("SIGHUP: the tokens stay as they are: %s", error)
        return None
    log.info("SIGHUP: the tokens are %s", "the same as before" if renewed == settings else "those of .env now")
    return renewed


def terminal_has_gone() -> bool:
    """Whether the terminal that this process writes to was closed, which sends SIGHUP too."""
    try:
        termios.tcgetattr(sys.stderr)
    except termios.error as error:
        return bool(error.args[0] == errno.EIO)
    return False
