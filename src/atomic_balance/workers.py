"""Several processes that serve the same port. gunicorn starts them, replaces one that has died, and stops them all.

They are forked from one process, which opened the listening sockets: a connection is accepted by whichever worker comes
first, and one that is waiting when a worker dies goes to another.
"""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker

from atomic_balance.counting import Numbers, shared_numbers
from atomic_balance.metrics import Metrics
from atomic_balance.serving import BACKLOG, run, serve, stop_on_signals
from atomic_balance.settings import Settings

log = logging.getLogger("atomic_balance")

_BEAT_SECONDS = 1.0
_FROZEN_SECONDS = 30
_MARGIN_SECONDS = 5


def serve_with_workers(settings: Settings, listeners: Sequence[socket.socket], ready: Callable[[], None]) -> None:
    """Serve with `settings.workers` processes until a signal says to stop; ends in SystemExit.

    `ready` is called when signals are heeded. Must be called in a process without threads, but for the log's and
    the one that keeps the embedded server: both mind that processes are forked beside them.
    """
    numbers = shared_numbers(2 * settings.workers)  # twice: while workers are replaced, old and new ones run

    def take_numbers(arbiter: Any, worker: "_Worker") -> None:
        taken = [other.own for other in arbiter.WORKERS.values()]
        worker.settings, worker.everyone = settings, numbers
        worker.own = next((free for free in numbers if free not in taken), numbers[-1])

    def give_back(_: object, worker: "_Worker") -> None:
        worker.own.end()

    _Supervisor(
        bind=[f"fd://{listener.detach()}" for listener in listeners],
        backlog=BACKLOG,
        workers=settings.workers,
        worker_class=_Worker,
        timeout=_FROZEN_SECONDS,
        graceful_timeout=int(2 * settings.drain_seconds + settings.shutdown_seconds + _MARGIN_SECONDS),
        logger_class=_Logger,
        control_socket_disable=True,
        when_ready=lambda _: ready(),
        pre_fork=take_numbers,
        child_exit=give_back,
    ).run()


class _Supervisor(BaseApplication):  # type: ignore[misc]
    """gunicorn with the given settings, whatever its own files and variables say."""

    def __init__(self, **settings: object) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> None:
        """Nothing: a worker makes its own application."""


class _Logger(Logger):  # type: ignore[misc]
    """gunicorn's warnings go where all lines go."""

    def setup(self, cfg: object) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


class _Worker(Worker):  # type: ignore[misc]
    settings: Settings
    own: Numbers
    everyone: Sequence[Numbers]

    def init_process(self) -> None:
        """Work, and end the process without a way back: what its parent has open is not its to close."""
        status = 1
        try:
            super().init_process()
            status = 0
        except BaseException:
            log.exception("a worker failed")
        finally:
            logging.shutdown()
            os._exit(status)

    def init_signals(self) -> None:
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def run(self) -> None:
        run(self._work())

    async def _work(self) -> None:
        stop = stop_on_signals()
        metrics = Metrics(self.own, self.everyone)
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._beat(metrics, stop))
            await serve(self.settings, [wrapped.sock for wrapped in self.sockets], metrics, stop)
            beating.cancel()

    async def _beat(self, metrics: Metrics, stop: asyncio.Event) -> None:
        """Say each second that this worker is not frozen, and stop when its parent has died."""
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            self.notify()
            metrics.publish()
            if os.getppid() != self.ppid:
                stop.set()
