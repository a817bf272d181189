"""What the application holds while it runs, by the keys under which its handlers find it."""

import asyncio

from aiohttp import web

from atomic_balance.commit.group_commit import GroupCommit
from atomic_balance.commit.hold_reader import HoldReader
from atomic_balance.http.bodies import Bodies
from atomic_balance.http.readiness import ReadinessProbe
from atomic_balance.observe.metrics import Metrics
from atomic_balance.postgres.accounts import Accounts

ACCOUNTS = web.AppKey("accounts", Accounts)
BODIES = web.AppKey("bodies", Bodies)
DATABASE_FOUND = web.AppKey("database_found", asyncio.Event)
"""Set once the database has answered and its schema was right: nothing is sent to it before."""
DRAINING = web.AppKey("draining", asyncio.Event)
"""Set when the process is about to stop: it answers what it has accepted, and closes each connection after that."""
GROUP_COMMIT = web.AppKey("group_commit", GroupCommit)
HOLDS = web.AppKey("holds", HoldReader)
METRICS = web.AppKey("metrics", Metrics)
OPENAPI = web.AppKey("openapi", bytes)
"""The OpenAPI document, as it is sent."""
OFFERS_RACES = web.AppKey("offers_races", bool)
"""Whether the live page offers its races."""
READINESS = web.AppKey("readiness", ReadinessProbe)
