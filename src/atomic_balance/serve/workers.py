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

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.errors import HaltServer
from gunicorn.glogging import Logger
from gunicorn.workers.base import Worker

from atomic_balance.http.authorization import Tokens
from atomic_balance.observe.counting import Numbers, shared_numbers
from atomic_balance.observe.metrics import Metrics
from atomic_balance.serve.serving import BACKLOG, StartError, run, serve
from atomic_balance.serve.signals import STOPPING, settings_with_new_tokens, stop_on_signals, terminal_has_gone
from atomic_balance.settings import WORKERS_MAX, Settings

log = logging.getLogger("atomic_balance")

_BEAT_SECONDS = 1.0
_FROZEN_SECONDS = 30
_MARGIN_SECONDS = 5


def serve_with_workers(
    settings: Settings, listeners: Sequence[socket.socket], awaits_database: bool, ready: Callable[[], None]
) -> None:
    """Serve with `settings.workers` processes until a signal says to stop; ends in SystemExit.

    `awaits_database`: as in `serve`. If it turns out to be no database to serve on, the exit status is 1.
    `ready` is called as soon as signals are handled. The process must have no threads but those of the log and of the
    embedded PostgreSQL, which allow for processes that are forked beside them.
    """
    _Supervisor(
        settings,
        awaits_database,
        bind=[f"fd://{listener.detach()}" for listener in listeners],
        backlog=BACKLOG,
        workers=settings.workers,
        worker_class=_Worker,
        timeout=_FROZEN_SECONDS,
        graceful_timeout=int(2 * settings.drain_seconds + settings.shutdown_seconds + _MARGIN_SECONDS),
        logger_class=_Logger,
        control_socket_disable=True,
        when_ready=lambda _: ready(),
        pre_fork=_Parent.equip,
        child_exit=lambda _, worker: worker.own.end(),
    ).run()


class _Supervisor(BaseApplication):  # type: ignore[misc]
    """gunicorn with the given configuration, whatever its own files and variables say."""

    def __init__(self, settings: Settings, awaits_database: bool, **configuration: object) -> None:
        self._settings = settings
        self._awaits_database = awaits_database
        self._configuration = configuration
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._configuration.items():
            self.cfg.set(name, value)

    def load(self) -> None:
        """Nothing: a worker makes its own application."""

    def run(self) -> None:
        _Parent(self, self._settings, self._awaits_database).run()


class _Parent(Arbiter):  # type: ignore[misc]
    """gunicorn's parent of the workers. It hands out settings and numbers, and bounds what signals can do."""

    def __init__(self, supervisor: _Supervisor, settings: Settings, awaits_database: bool) -> None:
        self._settings = settings
        self._awaits_database = awaits_database
        self._halting = False
        self._numbers = shared_numbers(2 * WORKERS_MAX)  # twice: while workers are replaced, old and new ones run
        super().__init__(supervisor)

    def equip(self, worker: "_Worker") -> None:
        """Give a worker, before it is forked, its settings and numbers that no other worker counts in."""
        taken = [other.own for other in self.WORKERS.values()]
        worker.settings, worker.everyone = self._settings, self._numbers
        worker.awaits_database = self._awaits_database
        worker.own = next(free for free in self._numbers if free not in taken)

    def spawn_worker(self) -> None:
        """Fork a worker. Signals to stop wait until it has handlers of its own in place of its parent's."""
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        super().spawn_worker()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def halt(self, reason: str | None = None, exit_status: int = 0) -> None:
        """Stop the workers and exit: with 1 if one of them found that there is nothing to serve, and said why."""
        self._halting = True
        super().halt(exit_status=1 if exit_status else 0)

    def reap_workers(self) -> None:
        """Take note of workers that have ended; while all of them stop, several may have found nothing to serve."""
        try:
            super().reap_workers()
        except HaltServer:
            if not self._halting:
                raise

    def handle_hup(self) -> None:
        """Replace the workers by ones that know the tokens of `.env` as it is now."""
        if terminal_has_gone():
            self.handle_term()
        elif len(self.WORKERS) + self.cfg.workers > len(self._numbers):
            log.error("SIGHUP is ignored: %s workers have not ended yet", len(self.WORKERS))
        elif renewed := settings_with_new_tokens(self._settings):
            self._settings = renewed
            super().handle_hup()

    def handle_ttin(self) -> None:
        """Add a worker, up to as many as WORKERS may be."""
        if self.num_workers < WORKERS_MAX:
            super().handle_ttin()
        else:
            log.warning("SIGTTIN is ignored: there are %s workers already", self.num_workers)

    def handle_usr1(self) -> None:
        """Nothing: there are no log files to open anew."""
        log.warning("SIGUSR1 is ignored")

    def handle_usr2(self) -> None:
        """Nothing: a second parent could not listen on the port of this one."""
        log.warning("SIGUSR2 is ignored: start a new service beside this one instead")


class _Logger(Logger):  # type: ignore[misc]
    """gunicorn's warnings go where all lines go."""

    def setup(self, cfg: object) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)


class _Worker(Worker):  # type: ignore[misc]
    settings: Settings
    awaits_database: bool
    own: Numbers
    everyone: Sequence[Numbers]

    def init_process(self) -> None:
        """Work, then end the process at once: what it has inherited from its parent is not for it to close."""
        status = 1
        try:
            super().init_process()
            status = 0
        except StartError as error:
            log.error("%s", error)
            status = Arbiter.WORKER_BOOT_ERROR  # the others would find the same: none is to be started in its place
        except BaseException:
            log.exception("a worker failed")
        finally:
            logging.shutdown()
            os._exit(status)

    def init_signals(self) -> None:
        parents = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # a closed terminal sends SIGHUP to everybody
        for number in self.SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in parents else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def run(self) -> None:
        run(self._work())

    async def _work(self) -> None:
        stop = stop_on_signals()
        metrics = Metrics(self.own, self.everyone)
        nothing_to_serve: StartError | None = None
        async with asyncio.TaskGroup() as tasks:
            beating = tasks.create_task(self._beat(metrics, stop))
            listeners = [wrapped.sock for wrapped in self.sockets]
            try:
                await serve(self.settings, listeners, metrics, Tokens(self.settings), stop, self.awaits_database)
            except StartError as error:
                nothing_to_serve = error
            beating.cancel()
        if nothing_to_serve is not None:
            raise nothing_to_serve

    async def _beat(self, metrics: Metrics, stop: asyncio.Event) -> None:
        """Tell the parent each second that this worker is not frozen, and stop when the parent has died."""
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            self.notify()
            metrics.publish()
            if os.getppid() != self.ppid:
                stop.set()
